"""The front and its volume, against what is found by enumerating everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.search import front, records
from unlearn.search.objectives import Constraint, Objective
from unlearn.search.records import Trial


@st.composite
def some_losses(draw) -> tuple[np.ndarray, np.ndarray]:
    """Points on a coarse grid, so that many are equal in an objective, and which of them count."""
    objectives, count = draw(st.integers(1, 4)), draw(st.integers(0, 7))
    row = st.lists(st.integers(0, 4), min_size=objectives, max_size=objectives)
    rows = draw(st.lists(row, min_size=count, max_size=count))
    counted = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return np.array(rows, float).reshape(count, objectives), np.array(counted, bool)


@given(some_losses())
def test_the_front_is_what_nothing_dominates(points):
    losses, counted = points

    def dominates(one, other) -> bool:
        gains = [b - a for a, b in zip(one, other, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    alive = [i for i in range(len(losses)) if counted[i]]
    expected = [i for i in alive if not any(dominates(losses[j], losses[i]) for j in alive)]
    assert front.front(losses, counted).tolist() == expected


@given(some_losses())
def test_the_volume_is_that_of_the_unit_cells(points):
    losses, _ = points
    objectives = losses.shape[1]
    cells = itertools.product(range(4), repeat=objectives)
    covered = sum(bool((losses <= np.array(cell)).all(1).any()) for cell in cells)
    assert front.hypervolume(losses, np.full(objectives, 4.0)) == pytest.approx(covered)


def test_what_has_no_value_or_breaks_a_bound_counts_for_nothing():
    losses = np.array([[1.0, 1.0], [0.0, np.nan], [0.0, 0.0], [2.0, 0.5]])
    counted = np.array([True, True, False, True])
    assert front.front(losses, counted).tolist() == [0, 3]
    assert front.history(losses, np.array([3.0, 2.0]), counted).tolist() == [2, 2, 2, 2.5]
    assert front.reference(losses, counted).tolist() == pytest.approx([2.1, 1.05])
    assert front.reference(losses[:0]).tolist() == [0, 0]


def test_equal_points_are_both_on_the_front():
    assert front.front(np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]])).tolist() == [0, 1]


def test_the_front_of_points_keeps_directions_bounds_and_failures():
    def trial(point: str, seed: int, kept: float, forgotten: float, status="done") -> Trial:
        return Trial(
            f"{point}-s{seed}-m0",
            point,
            seed,
            None,
            {},
            status,
            figures={"retain.cosine": kept, "forget.cosine": forgotten},
        )

    trials = [
        trial("a", 0, 0.8, 0.6), trial("a", 1, 0.6, 0.4), trial("b", 0, 0.9, 0.9), trial("c", 0, 0.6, 0.5),
        trial("d", 0, 0.1, 0.1), trial("e", 0, 1.0, 0.0), trial("e", 1, 1.0, 0.0, "failed"),
    ]  # fmt: skip
    objectives = [Objective("retain.cosine", "maximise"), Objective("forget.cosine", "minimise")]
    points = records.points(trials, [Constraint.parse("retain.cosine >= 0.5")])
    assert [point.id for point in front.of_points(points, objectives)] == ["b", "a"]  # c is dominated by the mean of a
    assert [point.id for point in front.of_points(records.points(trials), objectives)] == ["b", "a", "d"]
