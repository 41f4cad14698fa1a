"""How a figure moves with one parameter while all others stay: the curves of an ablation, with intervals over the
trials.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.evaluation.oracles import student
from unlearn.search.records import Point
from unlearn.search.space import canonical
from unlearn.search.study import is_number, labels, text

FEWEST = 3  # values along a curve
MOST = 8  # curves in one drawing


@dataclass(frozen=True)
class At:
    """One value of the parameter: the mean of the figure, its 95 % interval (None for one trial), each trial, and the
    point."""

    x: Any
    mean: float
    interval: tuple[float, float] | None
    values: list[float]
    point: str


@dataclass(frozen=True)
class Curve:
    """The points that differ in one parameter alone, in its order. fixed: what the others are, as text."""

    fixed: str
    at: list[At]


def curves(points: Sequence[Point], key: str, figure: str) -> list[Curve]:
    """The curves of a figure over a parameter, those with the most values first. Points without a trial that is done
    are left out; a searcher that draws every point anew leaves none that differ in one parameter alone, and so no
    curve."""
    names = labels(name for point in points for name in point.parameters)
    groups: dict[str, list[Point]] = {}
    for point in points:
        if key in point.parameters and figure in point.mean:
            others = {name: value for name, value in point.parameters.items() if name != key}
            groups.setdefault(canonical(others), []).append(point)
    made = []
    for group in groups.values():
        if len({canonical({key: point.parameters[key]}) for point in group}) < FEWEST:
            continue
        others = {names[name]: text(value) for name, value in group[0].parameters.items() if name != key}
        at = [_at(point, key, figure) for point in _in_order(group, key)]
        made.append(Curve(", ".join(f"{name} {value}" for name, value in others.items()), at))
    return sorted(made, key=lambda curve: -len(curve.at))[:MOST]


def parameters(points: Sequence[Point]) -> Iterator[str]:
    """Every parameter that has a curve."""
    for key in dict.fromkeys(key for point in points for key in point.parameters):
        figures = {figure for point in points for figure in point.mean}
        if figures and curves(points, key, min(figures)):
            yield key


def _in_order(points: list[Point], key: str) -> list[Point]:
    numbers = all(is_number(point.parameters[key]) for point in points)
    return sorted(points, key=lambda point: point.parameters[key]) if numbers else points


def _at(point: Point, key: str, figure: str) -> At:
    values = [trial.figures[figure] for trial in point.trials if trial.status == "done"]
    return At(point.parameters[key], point.mean[figure], interval(values), values, point.id)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean (Student's t); None for one value."""
    if len(values) < 2:
        return None
    half = student(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = math.fsum(values) / len(values)
    return mean - half, mean + half
