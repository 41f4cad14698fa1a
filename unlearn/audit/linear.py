"""Linear probes in closed form: ridge regression on standardised vectors, the same wherever it is computed."""

from dataclasses import dataclass

import numpy as np

from unlearn.data import order


@dataclass(frozen=True)
class Probe:
    """Scores (N, C) = standardised vectors (N, D) times weights (D, C), plus bias."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors - self.mean) / self.scale @ self.weights + self.bias


def fit(vectors: np.ndarray, targets: np.ndarray, ridge: float) -> Probe:
    """The probe of vectors (N, D) for targets (N, C). ridge: the penalty, in units of the number of rows."""
    vectors, targets = vectors.astype(np.float64), targets.astype(np.float64)
    mean, scale = vectors.mean(0), vectors.std(0)
    scale = np.where(scale > 1e-9 * (np.abs(mean) + 1e-12), scale, 1.0)
    x, bias = (vectors - mean) / scale, targets.mean(0)
    gram = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    return Probe(mean, scale, np.linalg.solve(gram, x.T @ (targets - bias) / len(x)), bias)


def crossed(
    positive: np.ndarray, negative: np.ndarray, ridge: float, folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (M,) scores of the rows of two kinds, each by a probe that was fitted without it."""
    both = np.concatenate([positive, negative])
    targets = np.r_[np.ones(len(positive)), -np.ones(len(negative))][:, None]
    # Each kind is dealt on its own, so that no fold lacks one.
    dealt = np.concatenate(
        [order.generator(seed, i, len(x)).permutation(len(x)) % folds for i, x in enumerate((positive, negative))]
    )
    scores = np.empty(len(both))
    for fold in range(folds):
        out = dealt == fold
        scores[out] = fit(both[~out], targets[~out], ridge)(both[out])[:, 0]
    return scores[: len(positive)], scores[len(positive) :]
