import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearn import config, views

KINDS = ["centre", "outpaint", "random", "box", "brush"]
SIZES = st.floats(0.01, 0.99)


def draw(kind, size, grid, count, seed):
    return views.draw([config.ViewSpec(kind=kind, size=size)], grid, count, np.random.default_rng(seed))


@given(st.sampled_from(KINDS), SIZES, SIZES, st.integers(2, 16), st.integers(1, 9), st.integers(0, 99))
def test_visible_and_hidden_are_the_whole_grid_and_no_row_differs_in_count(kind, a, b, grid, count, seed):
    view = draw(kind, tuple(sorted((a, b))), grid, count, seed)
    assert view.visible.shape[1] >= 1 and view.hidden.shape[1] >= 1 and len(view.visible) == len(view.hidden) == count
    assert torch.equal(
        torch.cat([view.visible, view.hidden], 1).sort(1).values, torch.arange(grid**2).expand(count, -1)
    )
    for part in (view.visible, view.hidden):
        assert part.dtype == torch.long and torch.equal(part, part.sort(1).values)
    again = draw(kind, tuple(sorted((a, b))), grid, count, seed)
    assert torch.equal(view.visible, again.visible) and torch.equal(view.hidden, again.hidden)


@pytest.mark.parametrize(
    "kind, hidden", [("centre", 64), ("outpaint", 192), ("random", 128), ("box", 64), ("brush", 128)]
)
def test_half_of_a_16_grid_hides_what_the_kind_says(kind, hidden):
    assert draw(kind, 0.5, 16, 4, 0).hidden.shape == (4, hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_mask_is_true_exactly_where_a_patch_is_hidden(kind):
    view = draw(kind, 0.4, 7, 5, 1)
    mask = view.pixel_mask(28)
    assert mask.shape == (5, 1, 28, 28) and mask.dtype == torch.bool
    for row in range(5):
        hidden = set(view.hidden[row].tolist())
        for patch in range(49):
            y, x = divmod(patch, 7)
            assert (mask[row, 0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] == (patch in hidden)).all()


@given(st.integers(2, 16), SIZES, st.integers(0, 99))
def test_shapes_are_what_they_are_called(grid, size, seed):
    centre, box = (draw(kind, size, grid, 3, seed).pixel_mask(grid)[:, 0] for kind in ("centre", "box"))
    assert torch.equal(draw("outpaint", size, grid, 3, seed).pixel_mask(grid)[:, 0], ~centre)
    for mask in [*centre, *box]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert len(rows) == len(columns) and mask.sum() == len(rows) ** 2
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == len(rows) - 1
    first, last = centre[0].any(1).nonzero()[[0, -1], 0].tolist()
    assert abs(first - (grid - 1 - last)) <= 1


def test_random_views_of_a_batch_differ_and_every_spec_is_drawn():
    assert len({tuple(v.tolist()) for v in draw("random", 0.5, 8, 16, 0).hidden}) == 16
    specs = [config.ViewSpec(size=0.25), config.ViewSpec(size=0.5), config.ViewSpec(kind="random", size=(0.3, 0.9))]
    rng = np.random.default_rng(0)
    counts = {views.draw(specs, 16, 1, rng).hidden.shape[1] for _ in range(50)}
    assert {16, 64} < counts and len(counts) > 10


def test_rows_and_to_keep_the_views_of_the_rows():
    view = draw("random", 0.5, 6, 5, 0)
    part = view.rows(2, 4).to("cpu")
    assert (
        torch.equal(part.visible, view.visible[2:4]) and torch.equal(part.hidden, view.hidden[2:4]) and part.grid == 6
    )


@pytest.mark.parametrize(
    "kind, hidden, after",
    [("centre", [5], 179), ("random", [3, 6, 8], 319), ("box", [0], 181), ("brush", [0, 1, 5], 433)],
)
def test_the_views_of_a_seed_never_change(kind, hidden, after):
    """The values themselves, and how far the generator has moved: a run begun with an older version goes on alike."""
    rng = np.random.default_rng(3)
    assert views.draw([config.ViewSpec(kind=kind, size=(0.2, 0.4))], 4, 1, rng).hidden[0].tolist() == hidden
    assert int(rng.integers(1000)) == after


def test_a_repeated_view_has_rows_of_its_own():
    """Rows that share memory cannot be pinned for a GPU."""
    view = views.draw([config.ViewSpec(size=0.5)], 4, 1, np.random.default_rng(0))
    many = views.repeated(view, 3)
    assert many.visible.is_contiguous() and many.hidden.is_contiguous() and many.visible.stride(0) > 0
    assert all(torch.equal(many.rows(n, n + 1).hidden, view.hidden) for n in range(3))


def test_the_fullest_view_hides_least():
    specs = [
        config.ViewSpec(kind="random", size=(0.3, 0.9)),
        config.ViewSpec(size=0.75),
        config.ViewSpec(kind="box", size=(0.5, 0.6)),
    ]
    view = views.fullest(specs, 8, 3, np.random.default_rng(0))
    assert view.visible.shape == (3, 8 * 8 - 16)  # the box of half the side
