"""The oracle: models trained without the forget set, one or several, as the third column; and how far a model is from
them.

Several oracles differ by their seeds alone, so their spread says what chance does, and is the unit of the distance

    (figure of the model - mean of the oracles) / standard deviation of the oracles.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

ORACLE = "oracle"
# Figures whose distances `whole` sums up: those that rest on single images, not on the number of them as FID does.
WHOLE = ("cosine", "psnr")
# Student's t at 97.5 %, by degrees of freedom from 1; beyond them the normal distribution's is near.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL = 1.96


def name(number: int) -> str:
    """The generator's name of oracle `number`, counted from 0."""
    return ORACLE if number == 0 else f"{ORACLE} {number + 1}"


def shown(generators: Iterable[str]) -> list[str]:
    """The columns of tables and pictures: of several oracles there is one."""
    return [generator for generator in generators if not generator.startswith(f"{ORACLE} ")]


def folded(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of metrics.json with one row of the oracle a set and view, the rows of each oracle where there are
    several).

    The one row holds the oracles' mean of every figure, and as `spread` their standard deviation; what is no number, or
    not known of all of them, is that of the first.
    """
    kept, single = [], [row for row in rows if row["generator"].startswith(ORACLE)]
    if len({row["generator"] for row in single}) < 2:
        return list(rows), []
    for row in rows:
        if row["generator"] == ORACLE:
            alike = [r for r in single if (r["set"], r["view"]) == (row["set"], row["view"])]
            values: dict[str, list[float]] = {
                key: [r[key] for r in alike] for key in row if all(isinstance(r.get(key), float) for r in alike)
            }
            spread = {key: statistics.stdev(each) for key, each in values.items()}
            kept.append(row | {key: statistics.fmean(each) for key, each in values.items()} | {"spread": spread})
        elif row not in single:
            kept.append(row)
    return kept, single


def distance(rows: Sequence[dict[str, Any]], view: str, count: int) -> dict[str, Any]:
    """How far each generator is from `count` oracles under a view, in units of their spread:

    {"count", "chance", "generators": {generator: {set: {figure: distance, ..., "whole"}}}}. A distance below 0 is a
    figure below the oracles' mean; whole: the root mean square of those of WHOLE. chance: 19 of 20 further oracles are
    within it. rows: as `folded` gives them. Figures that all oracles have alike have no distance.
    """
    found: dict[str, Any] = {}
    rows = [row for row in rows if row["view"] == view]
    for oracle in (row for row in rows if row["generator"] == ORACLE):
        for row in rows:
            if row["set"] != oracle["set"] or row is oracle:
                continue
            each = {
                figure: (row[figure] - oracle[figure]) / spread
                for figure, spread in oracle["spread"].items()
                if spread > 0 and isinstance(row.get(figure), float) and not figure.endswith(("_std", "_low", "_high"))
            }
            whole = [each[figure] ** 2 for figure in WHOLE if figure in each]
            each |= {"whole": math.sqrt(statistics.fmean(whole))} if whole else {}
            found.setdefault(row["generator"], {})[row["set"]] = each
    return {"count": count, "chance": chance(count), "generators": found}


def chance(count: int) -> float:
    """Within this distance of `count` oracles are 19 of 20 further ones, were their figures normally distributed."""
    return student(count) * math.sqrt(1 + 1 / count)


def student(count: int) -> float:
    """Student's t of `count` values for a two-sided interval of 95 %."""
    return STUDENT[count - 2] if count - 2 < len(STUDENT) else NORMAL


def told(measured: dict[str, Any]) -> str:
    """The sentence of the report, of what `distance` gives."""
    sets = measured["generators"]["unlearned"]
    before = measured["generators"].get("original", {})
    parts = [
        f"{each['whole']:.1f} on the {name} set" + (f" (before {before[name]['whole']:.1f})" if name in before else "")
        for name, each in sets.items()
        if "whole" in each
    ]
    return (
        f"Distance to the {measured['count']} oracles, in units of their own spread: {', '.join(parts)}. "
        f"Of further oracles 19 of 20 would be within {measured['chance']:.1f}."
    )
