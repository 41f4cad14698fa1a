"""Intervals of figures by the bootstrap over images, and the kernel distance of features, whose value and interval rest
on the same kernel matrices. The same seed gives the same intervals.
"""

from collections.abc import Callable

import numpy as np
import torch

from unlearn.data import order

STREAM = 1 << 29  # of the random numbers of a run: those of intervals
RESAMPLES = 1000
KERNEL_RESAMPLES = 200  # each is a product of two matrices
KERNEL_ROWS = 5000  # images of each set: three matrices of 200 MB
CONFIDENCE = 0.95


def of_mean(
    rows: torch.Tensor, seed: int, figure: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, float] | None:
    """The central interval of figure(mean of (N,) rows) over images drawn with replacement; None for a single image.

    figure: computed for many means at once.
    """
    if len(rows) < 2:
        return None
    weights = _counts(len(rows), RESAMPLES, seed)
    return _central(figure(weights @ rows.double() / len(rows)))


def kid(real: torch.Tensor, made: torch.Tensor, seed: int) -> tuple[float, float, float] | None:
    """(kernel distance, low, high) of two sets of features (N, D) and (M, D): the unbiased squared MMD with the kernel
    (x·y / D + 1)³ over all pairs, in float64. None for fewer than two images.

    Of more than KERNEL_ROWS images so many are drawn with the seed, since memory grows with the square of their number.
    Unlike FID it is not biased by few images. It may come out below 0 where the sets are alike.
    """
    if min(len(real), len(made)) < 2:
        return None
    x, y = (_some(rows, seed).double() for rows in (real, made))
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    value = _distance(xx, yy, xy, torch.ones(1, len(x)).double(), torch.ones(1, len(y)).double())
    paired = len(x) == len(y)  # reconstructions and their originals are drawn together
    a = _counts(len(x), KERNEL_RESAMPLES, seed)
    b = a if paired else _counts(len(y), KERNEL_RESAMPLES, seed + 1)
    return (float(value), *_central(_distance(xx, yy, xy, a, b)))


def _some(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """At most KERNEL_ROWS of them; of two sets of equal size the same."""
    if len(rows) <= KERNEL_ROWS:
        return rows
    return rows[torch.from_numpy(order.generator(seed, STREAM, len(rows)).permutation(len(rows))[:KERNEL_ROWS])]


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _distance(xx: torch.Tensor, yy: torch.Tensor, xy: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(R,) distances of samples in which image i is a[r, i], or b[r, j] times. No pair of an image with itself counts
    within a set."""

    def within(kernel: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
        found = ((counts @ kernel * counts).sum(1) - counts**2 @ kernel.diag()) / pairs
        return found.where(pairs > 0, torch.nan)  # without a pair a residue of rounding is divided by 0

    return within(xx, a) + within(yy, b) - 2 * (a @ xy * b).sum(1) / (a.sum(1) * b.sum(1))


def _counts(rows: int, draws: int, seed: int) -> torch.Tensor:
    """(draws, rows) float64: how often each row is drawn."""
    rng = order.generator(seed, STREAM, rows)
    return torch.from_numpy(rng.multinomial(rows, np.full(rows, 1 / rows), size=draws)).double()


def _central(draws: torch.Tensor) -> tuple[float, float]:
    """Of few images one alone may be drawn again and again, which has no pair of two."""
    low, high = np.nanquantile(draws.numpy(), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
