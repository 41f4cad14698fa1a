"""The figures of a whole set of images, which are no mean over them: FID and the Inception Score.

FID cannot be computed anew of images that are drawn with replacement: of one that is there twice the covariance knows
no more than of one, so the distance grows with every draw. What the bootstrap draws from instead is the influence of
each image, the FID to first order in the images' weights (the infinitesimal jackknife; Jaeckel, 1972; Efron, 1982).
"""

import torch

from unlearn.evaluation import oracles

SPLITS = 10


def frechet(real: torch.Tensor, made: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor] | None:
    """(FID, influence of each of `real` (N,), of each of `made` (M,)): the Fréchet distance of two sets of features
    (N, D) and (M, D), in float64; None for fewer than two images.

    The influences of a set are 0 on average; they are per image, so that the distance with image i counted 1 + e
    times is the FID + e * influence[i] / N.
    """
    if min(len(real), len(made)) < 2:
        return None
    (a, rows_a), (b, rows_b) = (_factor(features) for features in (real, made))
    means = [features.double().mean(0) for features in (real, made)]
    apart = means[0] - means[1]
    # The trace of the square root of the product of the covariances A'A and B'B: the singular values of AB', summed.
    left, common, right = torch.linalg.svd(a @ b.T, full_matrices=False)
    value = float(apart.square().sum() + a.square().sum() + b.square().sum() - 2 * common.sum())
    influences = []
    for features, mean, side, rows, sign in ((real, means[0], left, rows_a, 1), (made, means[1], right.T, rows_b, -1)):
        centred, count = features.double() - mean, len(features)
        turned = side if rows is None else rows @ side
        spread = centred.square().sum(1) * count / (count - 1) - count * (turned.square() @ common)
        influences.append(2 * sign * centred @ apart + spread - spread.mean())
    return max(value, 0.0), influences[0], influences[1]


def _factor(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(a matrix A of at most D rows with the covariance A'A of features (N, D), what turns its rows into those of the
    N images: None where A has them itself): few images make a small A, which is much quicker than the covariance."""
    centred = (features.double() - features.double().mean(0)) / (len(features) - 1) ** 0.5
    if len(centred) <= centred.shape[1]:
        return centred, None
    rows, factor = torch.linalg.qr(centred)
    return factor, rows


def inception_score(classes: torch.Tensor, seed: int) -> tuple[float, float | None, tuple[float, float] | None]:
    """(mean, standard deviation, 95 % interval of the mean) over ten splits of class scores (N, C), rows dealt to the
    splits by the seed. The last two are None where there is one split alone.

    The splits differ by one row at most, as in the original code; one that is much smaller than the others would
    inflate the deviation. No image is in two of them, so the interval is Student's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dealt = classes.double()[torch.randperm(len(classes))]
    scores = []
    for part in dealt.log_softmax(1).tensor_split(min(SPLITS, len(dealt))):
        marginal = part.exp().mean(0, keepdim=True).log()
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    mean, count = float(torch.stack(scores).mean()), len(scores)
    if count < 2:
        return mean, None, None
    deviation = float(torch.stack(scores).std())
    half = oracles.student(count) * deviation / count**0.5
    return mean, deviation, (mean - half, mean + half)
