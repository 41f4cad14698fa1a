"""The Pareto front of points with several objectives, and the volume that it dominates.

`losses` is float (N, K): a row a point, a column an objective, smaller is better in each (`Objective.loss` gives such
values whatever its direction is). A point that may not count (a constraint is broken) or has no value (NaN) is on no
front.
"""

from collections.abc import Sequence

import numpy as np

from unlearn.search.objectives import Objective
from unlearn.search.records import Point
from unlearn.search.records import losses as losses_of

MARGIN = 0.1  # of an objective's range, by which the reference is worse than the worst point


def table(points: Sequence[Point], objectives: Sequence[Objective]) -> tuple[np.ndarray, np.ndarray]:
    """(losses (N, K), NaN where a point lacks a figure; bool (N,), which points count: complete, and no bound is
    broken)."""
    rows = [losses_of(point, objectives) or [np.nan] * len(objectives) for point in points]
    counted = [point.complete and point.feasible for point in points]
    return np.array(rows, np.float64).reshape(-1, len(objectives)), np.array(counted, bool)


def of_points(points: Sequence[Point], objectives: Sequence[Objective]) -> list[Point]:
    """The points on the front, the best in the first objective first."""
    losses, counted = table(points, objectives)
    positions = front(losses, counted)
    return [points[i] for i in positions[np.argsort(losses[positions, 0], kind="stable")]]


def front(losses: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Positions of the points that no other one dominates: that is as good in every objective and better in one.

    counted: bool (N,), the points that count; None: all. Equal points are all on the front. int64 (M,), ascending.
    """
    alive = _alive(losses, counted)
    return np.array([i for i in alive if not _dominated(losses[i], losses[alive])], np.int64)


def reference(losses: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """(K,) a value of each objective that is a tenth of its range worse than the worst point that counts.

    The volume of a front is measured from here, so volumes can be compared only where the reference is the same.
    """
    alive = losses[_alive(losses, counted)]
    if not len(alive):
        return np.zeros(losses.shape[1])
    worst, span = alive.max(0), alive.max(0) - alive.min(0)
    span[span == 0] = 1.0  # one value alone: any margin will do
    return worst + MARGIN * span


def hypervolume(losses: np.ndarray, reference: np.ndarray) -> float:
    """Volume of all that is worse than at least one point, and better than the reference; exact.

    In the unit of the objectives' product. Points that are worse than the reference in an objective add nothing. The
    time grows with M to the power K - 1, for the M points of the front: fit for hundreds of points and up to four
    objectives.
    """
    return _volume(losses[(losses < reference).all(1)], reference)


def history(losses: np.ndarray, reference: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """(N,) the volume of the first 1, 2, ... N points; one that may not count adds nothing."""
    alive, volumes, known = set(_alive(losses, counted).tolist()), np.zeros(len(losses)), losses[:0]
    for i in range(len(losses)):
        if i in alive:
            known = np.concatenate([known, losses[i : i + 1]])
            known = known[front(known)]
        volumes[i] = hypervolume(known, reference)
    return volumes


def _alive(losses: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    known = np.isfinite(losses).all(1)
    return np.flatnonzero(known if counted is None else known & counted)


def _dominated(one: np.ndarray, others: np.ndarray) -> bool:
    return bool(((others <= one).all(1) & (others < one).any(1)).any())


def _volume(losses: np.ndarray, limit: np.ndarray) -> float:
    """By slices along the last objective: between two of its values the section is the volume of the points below."""
    if not len(losses):
        return 0.0
    if len(limit) == 1:
        return float(limit[0] - losses.min())
    losses = losses[np.argsort(losses[:, -1], kind="stable")]
    heights = np.append(losses[:, -1], limit[-1])
    volume = 0.0
    for i in range(len(losses)):
        if (thickness := heights[i + 1] - heights[i]) > 0:
            volume += float(thickness) * _volume(losses[: i + 1, :-1], limit[:-1])
    return volume
