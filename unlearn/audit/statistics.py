"""Figures with their uncertainty: areas under ROC curves, and intervals by the bootstrap, the same for the same
seed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from unlearn.data import order
from unlearn.evaluation import oracles

STREAM = 1 << 25  # of the random numbers of a run: those of the bootstrap
FEW = 10  # images under which an interval by the bootstrap is too narrow to judge by; of one it has no width at all


@dataclass(frozen=True)
class Estimate:
    """A figure, and what it would have been for other samples of the same images. draws: (resamples,), empty where the
    figure has no interval. images: on how many it rests, of the kind that there are fewest of; None where it does not
    matter."""

    value: float
    draws: np.ndarray
    images: int | None = None

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """The central interval of the draws; None without any."""
        if not len(self.draws):
            return None
        low, high = np.quantile(self.draws, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def minus(self, other: "Estimate") -> "Estimate":
        """The difference. Draws that rest on the same images are paired, so what both share falls out."""
        if not len(other.draws) or not len(self.draws):
            draws = self.draws - other.value if len(self.draws) else self.value - other.draws
        else:
            draws = self.draws - other.draws
        return Estimate(self.value - other.value, draws)


def constant(value: float) -> Estimate:
    """A figure that is known."""
    return Estimate(value, np.empty(0))


def mean(estimates: list[Estimate]) -> Estimate:
    """The mean of several, such as of the oracles."""
    return Estimate(
        float(np.mean([e.value for e in estimates])), np.mean([e.draws for e in estimates], axis=0)
    )  # fmt: skip


def bootstrap(
    statistic: Callable[..., float], *samples: np.ndarray, resamples: int, seed: int, trainings: int | None = None
) -> Estimate:
    """statistic(*samples), and the same of `resamples` draws with replacement of the rows of each sample, which are
    images.

    The rows that are drawn depend on the seed and the sizes alone: estimates over equally many rows are paired.
    trainings: where the statistic takes numbers of trainings, 0 .. trainings - 1, behind the samples; they are drawn
    likewise.
    """
    images = min(map(len, samples))
    samples = samples if trainings is None else (*samples, np.arange(trainings))
    draws = np.empty(resamples)
    for i in range(resamples):
        rng = order.generator(seed, STREAM, i)
        draws[i] = statistic(*(sample[rng.integers(0, len(sample), len(sample))] for sample in samples))
    return Estimate(float(statistic(*samples)), draws, images)


def widened(statistic: Callable[..., float], count: int) -> Callable[..., float]:
    """statistic(rows, drawn), for a bootstrap over rows and over `count` numbers of trainings, 0 .. count - 1, whose
    interval at 95 % holds what it should.

    Drawn from few values, a mean varies too little, by sqrt((count - 1) / count), and its quantiles are the normal
    distribution's, not Student's t. So what the draw of trainings adds is made larger by both; the rows' part stays.
    """
    if count < 2:
        return statistic
    factor, every = oracles.student(count) / oracles.NORMAL * (count / (count - 1)) ** 0.5, np.arange(count)

    def wider(rows: np.ndarray, drawn: np.ndarray) -> float:
        middle = statistic(rows, every)
        return middle + factor * (statistic(rows, drawn) - middle)

    return wider


def average(rows: np.ndarray) -> float:
    return float(rows.mean())


def psnr(errors: np.ndarray) -> float:
    """dB, from the mean of squared errors of pixels in [0, 1]; at most 100."""
    return float(-10 * np.log10(max(errors.mean(), 1e-10)))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that a positive scores higher than a negative; a tie counts half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    upto = np.searchsorted(ordered, positive, side="right")
    return float((below + upto).mean() / (2 * len(negative)))


def tpr_at(positive: np.ndarray, negative: np.ndarray, fpr: float) -> float:
    """The share of positives above the threshold that at most a share `fpr` of the negatives exceed."""
    allowed = int(np.floor(fpr * len(negative) + 1e-9))
    threshold = np.sort(negative)[::-1][allowed] if allowed < len(negative) else -np.inf
    return float((positive > threshold).mean())
