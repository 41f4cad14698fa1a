"""The order of samples: the same global batches for any number of workers, gone on from anywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.data import order


def stream(n: int, group: int = 3, seed: int = 0, name: int = 0, window: int = 1 << 20) -> order.Stream:
    return order.Stream(np.arange(n) * 2, np.arange(0, n, group), seed, name, window)


def global_batches(s: order.Stream, start: int, stop: int, workers: int, per_step: int, count: int) -> list[list[int]]:
    """What the workers compute, put together: micro-batches in the order of their numbers."""
    steps = []
    for step in range(start, stop):
        mine = {
            n: s.take(n * count, count).tolist()
            for r in range(workers)
            for n in order.micro_batches(step, r, workers, per_step)
        }
        assert sorted(mine) == list(range(step * per_step, (step + 1) * per_step))
        steps.append([row for n in sorted(mine) for row in mine[n]])
    return steps


@pytest.mark.parametrize("n", range(1, 9))
def test_any_workers_and_any_resume_give_the_same_global_batches(n):
    for per_step, count in itertools.product((1, 2, 3, 4, 6), (1, 2, 3)):
        whole = global_batches(stream(n), 0, 6, 1, per_step, count)
        for workers in (w for w in range(1, 5) if per_step % w == 0):
            for resume in range(6):
                later = global_batches(stream(n), resume, 6, workers, per_step, count)
                assert later == whole[resume:]
        flat = list(itertools.chain(*whole))
        for epoch in range(len(flat) // n):
            assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(0, 2 * n, 2))


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 6000), st.integers(0, 10**9), st.integers(0, 10**6))
def test_a_large_stream_is_a_permutation_a_pass_whatever_way_it_is_read(n, group, window, seed, at):
    s = stream(n, group, seed, window=window)
    epoch, offset = divmod(at, n)
    one_pass = s.take(epoch * n, n)
    assert np.array_equal(np.sort(one_pass), s.rows)
    assert np.array_equal(s.take(at, n - offset), one_pass[offset:])
    cut = n // 3
    pieces = np.concatenate(
        [stream(n, group, seed, window=window).take(at + i, j - i) for i, j in ((0, cut), (cut, n))]
    )
    assert np.array_equal(s.take(at, n), pieces)


def test_passes_seeds_and_sets_are_shuffled_differently():
    n = 200
    orders = [stream(n).take(0, n), stream(n).take(n, n), stream(n, seed=1).take(0, n), stream(n, name=1).take(0, n)]
    assert len({tuple(o.tolist()) for o in orders}) == 4
    assert not np.array_equal(orders[0], np.arange(n) * 2)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 500), st.integers(0, 99))
def test_a_windowed_shuffle_touches_few_row_groups_at_a_time(groups, size, window, seed):
    of_row = np.repeat(np.arange(groups), size)
    shuffled = of_row[order.shuffle(np.arange(0, len(of_row), size), len(of_row), window, np.random.default_rng(seed))]
    # A run of whole row groups is about a window, so any stretch of one window lies in at most two neighbouring runs.
    most = 2 * (-(-window // size) + 1)
    for start in range(0, len(shuffled), max(1, window // 2)):
        assert len(set(shuffled[start : start + window])) <= most


def test_a_window_of_one_row_group_reads_each_row_group_once():
    of_row = np.repeat(np.arange(20), 8)
    shuffled = of_row[order.shuffle(np.arange(0, 160, 8), 160, 8, np.random.default_rng(0))]
    assert len(list(itertools.groupby(shuffled))) == 20 and list(dict.fromkeys(shuffled)) != list(range(20))


@given(st.integers(2, 512), st.floats(0, 0.999))
def test_split_keeps_a_row_of_each_role_and_every_row(size, fraction):
    retain, forget = order.split(size, fraction)
    assert retain + forget == size and retain >= 1
    assert (forget == 0) == (fraction == 0) and abs(forget - size * fraction) <= 1


@pytest.mark.parametrize("key, other", [((1, 2), (2, 1)), ((1,), (1, 1)), ((0, 5, 6), (0, 6, 5))])
def test_a_generator_depends_on_its_whole_key_alone(key, other):
    assert order.generator(*key).integers(1 << 60) == order.generator(*key).integers(1 << 60)
    assert order.generator(*key).integers(1 << 60) != order.generator(*other).integers(1 << 60)


def test_the_order_of_a_seed_never_changes():
    """The values themselves: a run begun with an older version goes on with the same batches."""
    assert stream(10, 3, seed=7).take(0, 10).tolist() == [2, 4, 0, 18, 16, 8, 14, 12, 6, 10]
    assert stream(10, 3, seed=7, window=4).take(5, 10).tolist() == [10, 12, 14, 18, 16, 0, 10, 8, 4, 6]


@pytest.mark.parametrize("n, group", [(5, 5), (11, 3), (1, 1)])
def test_every_worker_has_rows_of_a_set_smaller_than_a_batch_in_few_row_groups(n, group):
    """Eight workers, one to four row groups, a global batch of 32: nobody is without rows, and no row is taken more
    often."""
    s, seen = stream(n, group), np.zeros(2 * n, int)
    for step, rank in itertools.product(range(n), range(8)):
        mine = [s.take(number * 4, 4) for number in order.micro_batches(step, rank, 8, 8)]
        assert [len(rows) for rows in mine] == [4]
        np.add.at(seen, mine[0], 1)
    assert set(seen[::2]) == {32} and not seen[1::2].any()
