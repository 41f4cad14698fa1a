"""report.html and report.json of a sweep: the front, every point with its pictures, and the drawings. It loads nothing
from anywhere: plotly.js is in it, once.
"""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from unlearn import __version__
from unlearn.data.storage import Storage
from unlearn.evaluation.report import data_uri
from unlearn.page import filled
from unlearn.search import alone, chart, charts, front, means, study
from unlearn.search.records import Point, Trial, points
from unlearn.search.space import Sweep, canonical

NAME, DATA = "report.html", "report.json"
PICTURE = 128  # pixels of a picture's side at most: it is one of many in the page
# Picture grids of a point, as unlearn.evaluation.measure makes them.
Grids = dict[str, list[dict]]


def check() -> None:
    """Raises MissingExtra where what draws the page is not installed."""
    chart.module()
    with study.optuna("the page of a sweep"):
        pass


def write(sweep: Sweep, trials: Sequence[Trial], grids: Grids | None = None) -> str:
    """Write both into the sweep's folder; the page's URI. grids: the pictures that are shown, by point. No id is ever
    shown.

    Raises MissingExtra.
    """
    every = in_order(points(trials, sweep.bounds))
    varied = _varied(sweep, every)
    shown = [
        replace(p, parameters={key: alone.mask(p.parameters[key], key) for key in varied if key in p.parameters})
        for p in every
    ]
    best = [point.id for point in front.of_points(every, sweep.wanted)]
    pictures: dict[str, str] = {}
    html = filled(
        Path(__file__).with_name("page.html"),
        name=sweep.name,
        headline=_headline(sweep, every, best),
        sentences=list(_sentences(sweep, trials)),
        **{
            part: [vars(one) | {"figure": _plain(one.figure)} for one in drawn]
            for part, drawn in charts.charts(shown, sweep.wanted, sweep.bounds).items()
        },
        heads=[o.figure for o in sweep.wanted],
        keys=list(study.labels(key for point in shown for key in point.parameters).values()),
        points=[
            _point(sweep, point, told, point.id in best, _picture_rows((grids or {}).get(point.id, []), pictures))
            for point, told in sorted(
                zip(every, shown, strict=True), key=lambda pair: (*best, pair[0].id).index(pair[0].id)
            )
        ],
        measured_again=any(trial.held_out for trial in trials),
        forget_shown=any(grid["set"] == "forget" for each in (grids or {}).values() for grid in each),
        facts=_facts(sweep, trials, every),
        failures=Counter(t.message or t.status for t in trials if t.status in ("failed", "infeasible")).most_common(),
        pictures=pictures,
        plotly=chart.script(),
    )
    storage = Storage(sweep.sweep_dir)
    storage.write(DATA, json.dumps(document(sweep, trials), indent=1, allow_nan=False).encode())
    storage.write(NAME, html.encode())
    return storage.where(NAME)


def document(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, Any]:
    """What is in report.json: the points with their figures as tuned and on held-out images, the front, its
    hypervolume."""
    every = in_order(points(trials, sweep.bounds))
    losses, counted = front.table(every, sweep.wanted)
    reference = front.reference(losses, counted)
    best = {point.id for point in front.of_points(every, sweep.wanted)}
    return {
        "software": f"unlearn {__version__}", "name": sweep.name, "sweep": sweep.identity(),
        "objectives": sweep.objectives, "constraints": sweep.constraints,
        "trials": dict(Counter(trial.status for trial in trials)),
        "reference": {
            o.figure: r if o.direction == "minimise" else -r for o, r in zip(sweep.wanted, reference.tolist(),
                strict=True)
        },
        "hypervolume": front.hypervolume(losses[counted], reference),
        "points": [
            {
                "id": p.id, "parameters": alone.mask(p.parameters), "front": p.id in best, "feasible": p.feasible,
                "complete": p.complete, "message": p.message, "mean": p.mean, "spread": p.spread,
                "held_out": means.held_out(p) or None,
            }
            for p in every
        ],
    }  # fmt: skip


def in_order(every: Iterable[Point]) -> list[Point]:
    """As they ended: each with the last of its trials."""
    return sorted(every, key=lambda point: (max(trial.ended or "~" for trial in point.trials), point.id))


def _varied(sweep: Sweep, every: Sequence[Point]) -> list[str]:
    """The parameters that tell points apart: not those tied to another, nor those with one value throughout."""
    keys = dict.fromkeys(key for point in every for key in point.parameters)
    values = {key: {canonical({key: p.parameters[key]}) for p in every if key in p.parameters} for key in keys}
    free = [key for key in keys if key not in sweep.search or not sweep.search[key].same_as]
    return [key for key in free if len(values[key]) > 1]


def _headline(sweep: Sweep, every: Sequence[Point], best: list[str]) -> str:
    if not best:
        return "No point is complete yet." if not any(p.complete for p in every) else "No point keeps every bound."
    if len(sweep.wanted) == 1:
        return f"{best[0]} is the best of {len(every)} points."
    return f"{len(best)} of {len(every)} points {'is' if len(best) == 1 else 'are'} on the Pareto front."


def _sentences(sweep: Sweep, trials: Sequence[Trial]) -> Iterator[str]:
    wanted = " and ".join(
        f"{o.figure} ({'smaller' if o.direction == 'minimise' else 'larger'} is better)" for o in sweep.wanted
    )
    bounds = f", with {' and '.join(map(str, sweep.bounds))}" if sweep.bounds else ""
    images = sweep.tune_on.data or "images of the training shards"
    limit = f", {sweep.tune_on.limit:,} of each set at most" if sweep.tune_on.limit else ""
    yield f"Searched for {wanted}{bounds}, measured on {images}{limit}."
    if any(trial.held_out for trial in trials):
        judged = "All points" if means.all_held_out(points(trials)) else "The points of the front"
        yield (
            f"{judged} were then measured once more on held-out images, which the search has not seen: judge by those."
        )
    elif held_out_named(sweep):
        yield "Nothing here is measured on held-out images: a search picks what is good by chance too."
    else:
        yield (
            "The run names no held-out images (evaluation.data), so nothing here tells of images that the search has "
            "not seen."
        )


def held_out_named(sweep: Sweep) -> bool:
    """Whether the run names images that the search did not measure on."""
    evaluation = alone.evaluation(sweep)
    return bool(evaluation.data or evaluation.split)


def _facts(sweep: Sweep, trials: Sequence[Trial], every: Sequence[Point]) -> list[tuple[str, str]]:
    counts = Counter(trial.status for trial in trials)
    facts = [
        ("Points", f"{len(every)}, each with {len(sweep.pairs())} trial(s)"),
        ("Trials", ", ".join(f"{count} {status}" for status, count in counts.items())),
        (
            "Searched by",
            sweep.search_by + (f", stopped early by {sweep.stop_early}" if sweep.stop_early != "none" else ""),
        ),
    ]
    facts += [
        (
            key,
            str(
                alone.mask(domain.model_dump(exclude_defaults=True).get("choice"), key)
                if key.endswith(alone.PRIVATE)
                else _domain(domain)
            ),
        )
        for key, domain in sweep.search.items()
    ]
    done = [trial for trial in trials if trial.status == "done" and trial.seconds]
    for warm, name in ((False, "on new workers"), (True, "on workers that stay")):
        if of := [trial.seconds for trial in done if trial.warm == warm]:
            parts = ", ".join(
                f"{part} {statistics.median(s.get(part, 0) for s in of):.3g} s"
                for part in dict.fromkeys(p for s in of for p in s)
            )
            facts.append((f"A trial {name}, median of {len(of)}", parts))
    return [*facts, ("Software", f"unlearn {__version__}"), ("Sweep", f"sha256 {sweep.identity()}")]


def _domain(domain) -> str:
    return "; ".join(
        f"{kind} {study.text(value, 300)}" for kind, value in domain.model_dump(exclude_defaults=True).items()
    )


def _point(sweep: Sweep, point: Point, told: Point, best: bool, grids: list[dict]) -> dict[str, Any]:
    """All that the page says of a point."""
    held_out = means.held_out(point)
    others = ({"held out": held_out} if held_out else {}) | means.compared_with([point])
    done = sum(trial.status == "done" for trial in point.trials)
    names = study.labels(told.parameters)
    main = dict.fromkeys([o.figure for o in sweep.wanted] + [b.figure for b in sweep.bounds])
    plain = [name for name in point.mean if "[" not in name and name.count(".") == 1]
    figures = [name for name in dict.fromkeys([*main, *sorted(plain)]) if name in point.mean]
    state = (
        "on the front" if best else "not complete" if not point.complete else "" if point.feasible else "breaks a bound"
    )
    return {
        "id": point.id, "best": best, "state": state, "grids": grids,
        "parameters": [(names[key], study.text(value)) for key, value in told.parameters.items()],
        "wanted": [_value(point, o.figure, done) for o in sweep.wanted],
        "held_out": [f"{held_out[o.figure]:.4g}" if o.figure in held_out else "–" for o in sweep.wanted],
        "columns": ["tuned on", *others],
        "figures": [
            (name, [_value(point, name, done), *(_number(other.get(name)) for other in others.values())])
            for name in figures
        ],
        "trials": [
            {
                "id": t.id, "status": t.status, "message": t.message or "", "run": t.run,
                "seconds": f"{sum(t.seconds.values()):.0f} s" if t.seconds else "",
            }
            for t in point.trials
        ],
        "config": alone.text(sweep, point, point.trials[0].seed, point.trials[0].model, masked=True),
    }  # fmt: skip


def _value(point: Point, figure: str, done: int) -> str:
    if figure not in point.mean:
        return "–"
    return f"{point.mean[figure]:.4g}" + (f" ± {point.spread[figure]:.2g}" if done > 1 else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _picture_rows(grids: list[dict], pictures: dict[str, str]) -> list[dict]:
    """[{"set", "columns", "rows": [(label, [key of a picture, ...])]}]; what is equal is in `pictures` once."""
    made = []
    for grid in grids:
        keys = [[_kept(_small(image), pictures) for image in images] for _, images in grid["columns"]]
        rows = [(label, [column[row] for column in keys]) for row, label in enumerate(grid["labels"])]
        made.append({"set": grid["set"], "columns": [title for title, _ in grid["columns"]], "rows": rows})
    return made


def _small(image: torch.Tensor) -> torch.Tensor:
    """uint8 (3, S, S) with S of at most PICTURE."""
    if image.shape[-1] <= PICTURE:
        return image
    return functional.interpolate(image[None].float(), (PICTURE, PICTURE), mode="area")[0].round().to(torch.uint8)


def _kept(image: torch.Tensor, pictures: dict[str, str]) -> str:
    uri = data_uri(image)
    key = hashlib.sha256(uri.encode()).hexdigest()[:12]
    pictures[key] = uri
    return key


def _plain(figure) -> dict[str, Any]:
    """A figure as plain values, without plotly's own theme: the page has one for all."""
    made = json.loads(figure.to_json())
    made["layout"].pop("template", None)
    made["layout"].pop("title", None)
    return made
