"""What came of a comparison: a row a method, its figures as means over seeds and originals with their spread.

leaderboard.json holds

    software, name, seeds, originals, oracles    what was compared; oracles: of each original, how many
    view                                         under which the figures are; the run's first
    tuned                                        how many settings of each method were tried on training images; 1: none
    distance                                     "oracle spreads": of the oracles' own spread; "cosine": distance in
                                                 cosine from the one oracle; null without one
    chance                                       within which 19 of 20 further oracles are; null without a spread
    reference                                    {"original" | "oracle": {figure: mean}}
    rows                                         [{method, options, done, of, failed, audits, figures: {figure: {mean,
                                                 spread}}}], the nearest to the oracles first; spread: standard
                                                 deviation over seeds and originals, null for one; failed: what a run
                                                 said that did not end well; audits: {"verdicts": {verdict: runs},
                                                 "failed": {test: runs}, "broken": runs whose audit came to no end,
                                                 "message": what one of these said}
    audited                                      the tests that any run was audited with
    notes                                        sentences that a reader of the table must know

Figures: those of a trial (forget.cosine, retain.psnr, cost.flops, cost.seconds ...), and forget.distance,
retain.distance and distance (the root mean square of both), and audit.passed, the share of runs with an audit.json
whose verdict is PASS.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from unlearn import __version__, documents
from unlearn.data.storage import Storage
from unlearn.search.compare import Compare
from unlearn.search.objectives import Figures
from unlearn.search.records import Trial
from unlearn.search.space import Parameters, canonical

NAME = "leaderboard.json"
AUDIT = "audit.json"
AUDIT_FAILED = "audit_failed.json"  # {"options", "message"}: of an audit that came to no end
METRICS = "metrics.json"


def document(
    compare: Compare, chosen: dict[str, Parameters], trials: Sequence[Trial], folder: Storage
) -> dict[str, Any]:
    """The whole of it. chosen: the settings of each method; folder: where the trials' run folders are."""
    known = {trial.id: _read(folder, trial, METRICS) for trial in trials if trial.status == "done"}
    measured = {id: metrics for id, metrics in known.items() if metrics}
    lost = {
        id: f"{METRICS} of {id} is missing or damaged: delete its record in trials, and the run is made again"
        for id in known
        if id not in measured
    }
    chances = [m["oracle_distance"]["chance"] for m in measured.values() if "oracle_distance" in m]
    audits = {trial.id: _read(folder, trial, AUDIT) for trial in trials if trial.id in measured}
    unmade = [trial for trial in trials if trial.id in measured and not audits[trial.id]]
    broken = {trial.id: said for trial in unmade if (said := _read(folder, trial, AUDIT_FAILED).get("message"))}
    figures = {id: _figures(trial, measured[id], audits[id]) for trial in trials if (id := trial.id) in measured}
    settings = compare.settings
    oracles = [len(o.oracles) for o in compare.originals] if compare.originals else [len(settings.evaluation.oracles)]
    rows = []
    for label, parameters in chosen.items():
        mine = [trial for trial in trials if canonical(trial.parameters) == canonical(parameters)]
        rows.append({
            "method": label, "options": parameters, "of": len(compare.seeds) * len(compare.originals or [None]),
            "done": sum(trial.id in figures for trial in mine),
            "failed": next((said for trial in mine if (said := trial.message or lost.get(trial.id))), None),
            "audits": _verdicts(
                [audits[trial.id] for trial in mine if audits.get(trial.id)],
                [broken[trial.id] for trial in mine if trial.id in broken],
            ),
            "figures": _means([figures[trial.id] for trial in mine if trial.id in figures]),
        })  # fmt: skip
    rows.sort(key=lambda row: row["figures"].get("distance", {"mean": math.inf})["mean"])
    done = [trial for trial in trials if trial.id in measured]
    originals = [_with_distances(trial.original, measured[trial.id], "original") for trial in done]
    made = {
        "software": f"unlearn {__version__}", "name": compare.name, "seeds": compare.seeds,
        "originals": len(compare.originals or [None]),
        "oracles": oracles, "view": settings.evaluation.views[0].name,
        "tuned": max(len(compare.candidates(label)) for label in compare.methods),
        "distance": "oracle spreads" if chances else "cosine" if any(oracles) else None,
        "chance": max(chances, default=None),
        "reference": {
            "original": {name: each["mean"] for name, each in _means(originals).items()},
            "oracle": {
                name: each["mean"] for name, each in _means([trial.oracle for trial in done if trial.oracle]).items()
            },
        },
        "rows": rows, "audited": list(dict.fromkeys(test for a in audits.values() for test in a.get("tests", []))),
    }  # fmt: skip
    return made | {"notes": _notes(made)}


def _read(folder: Storage, trial: Trial, name: str) -> dict[str, Any]:
    """A JSON file of a trial's run folder; empty where it is not there or damaged."""
    place = f"{trial.run}/{name}"
    return documents.mapping(folder.read(place)) if folder.is_file(place) else {}


def _figures(trial: Trial, metrics: dict[str, Any], audit: dict[str, Any]) -> Figures:
    """A trial's figures with its distances."""
    figures = _with_distances(trial.figures, metrics, "unlearned")
    if "verdict" in audit:
        figures["audit.passed"] = float(audit["verdict"] == "PASS")
    return figures


def _with_distances(figures: Figures, metrics: dict[str, Any], generator: str) -> Figures:
    """Figures of one of the generators of metrics.json, with its distances to the oracle."""
    figures = dict(figures)
    whole = metrics.get("oracle_distance", {}).get("generators", {}).get(generator, {})
    for name in ("forget", "retain"):
        if "whole" in whole.get(name, {}):
            figures[f"{name}.distance"] = whole[name]["whole"]
        elif f"{name}.cosine.to_oracle" in figures:
            figures[f"{name}.distance"] = figures[f"{name}.cosine.to_oracle"]
    if "forget.distance" in figures and "retain.distance" in figures:
        figures["distance"] = math.hypot(figures["forget.distance"], figures["retain.distance"]) / math.sqrt(2)
    return figures


def _verdicts(audits: Sequence[dict[str, Any]], broken: Sequence[str]) -> dict[str, Any]:
    """How many audits came to each verdict, how many failed in each test, and what is known of the broken ones."""
    failed = [test for a in audits for test in a.get("tests", []) if a.get(test, {}).get("verdict") == "FAIL"]
    return {
        "verdicts": dict(Counter(a["verdict"] for a in audits if "verdict" in a)), "failed": dict(Counter(failed)),
        "broken": len(broken), "message": next(iter(broken), None),
    }  # fmt: skip


def _means(each: Iterable[Figures]) -> dict[str, dict[str, float | None]]:
    """{figure: {"mean", "spread"}} of what all of these have."""
    each = list(each)
    names = sorted(set.intersection(*(set(figures) for figures in each))) if each else []
    values = {name: [figures[name] for figures in each] for name in names}
    return {
        name: {"mean": statistics.fmean(v), "spread": statistics.stdev(v) if len(v) > 1 else None}
        for name, v in values.items()
    }


def _notes(made: dict[str, Any]) -> list[str]:
    notes = []
    if made["distance"] is None:
        notes.append(
            "There is no oracle: nothing says how far forgetting should go, and the rows are in no order of merit."
        )
    elif made["distance"] == "cosine":
        notes.append(
            "There is one oracle for an original: its distance is told in cosine, and nothing says what chance would "
            "do."
        )
    else:
        notes.append(
            "Distances are in units of the oracles' own spread (cosine and PSNR in the hole, root mean square); of "
            f"further oracles 19 of 20 would be within {made['chance']:.1f}."
        )
    if made["tuned"] > 1:
        notes.append(
            f"Each method was tuned alike: {made['tuned']} settings on training images, with the first seed and "
            "original; the figures are of other runs, on the images of the run's evaluation."
        )
    if made["audited"]:
        notes.append(
            "Audit: how many runs came to each verdict, and in brackets how many of them failed in which test. Made "
            f"with these tests: {', '.join(made['audited'])}."
        )
    for row in made["rows"]:
        if count := row["audits"]["broken"]:
            told = f"{count} run{'' if count == 1 else 's'} of {row['method']} could not be audited"
            notes.append(f"{told}: {row['audits']['message']}")
    missing = [row["method"] for row in made["rows"] if row["done"] < row["of"]]
    if missing:
        notes.append(f"Not every run of {', '.join(missing)} has ended well.")
    return notes
