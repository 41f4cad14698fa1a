"""Means that stand beside those of a point: its trials on held-out images, and what every point is compared with."""

from collections.abc import Sequence
from dataclasses import replace

from unlearn.search.objectives import derived
from unlearn.search.records import Point, Trial, point


def held_out(point: Point) -> dict[str, float]:
    """The mean over its trials of each figure on the held-out images; empty where it was not measured there."""
    measured = [trial.held_out for trial in point.trials if trial.held_out]
    names = set.intersection(*map(set, measured)) if measured else set()
    return {name: sum(figures[name] for figures in measured) / len(measured) for name in sorted(names)}


def all_held_out(points: Sequence[Point]) -> list[Point]:
    """The points with what was found on the held-out images in place of what they were tuned on; none where a trial
    that is done was not measured there."""
    done = [trial for each in points for trial in each.trials if trial.status == "done"]
    if not all(trial.held_out for trial in done):
        return []

    def found(trial: Trial) -> Trial:
        cost = {name: value for name, value in trial.figures.items() if name.startswith("cost.")}
        return replace(trial, figures=cost | (trial.held_out or {}))

    return [replace(point(p.id, [found(t) for t in p.trials]), parameters=p.parameters) for p in points]


def compared_with(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """{"original model", "oracle": the mean over all trials of its figures, derived ones among them}, where there is
    one."""
    made = {}
    done = [trial for point in points for trial in point.trials if trial.status == "done"]
    for name, chosen in (("original model", "original"), ("oracle", "oracle")):
        each = [derived(getattr(t, chosen), t.original, t.oracle) for t in done if getattr(t, chosen)]
        names = set.intersection(*map(set, each)) if each else set()
        if names:
            made[name] = {figure: sum(figures[figure] for figures in each) / len(each) for figure in sorted(names)}
    return made
