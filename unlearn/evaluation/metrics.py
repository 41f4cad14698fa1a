"""The figures of one set under one view, FID, KID, IS, cosine, PSNR, SSIM and LPIPS, from what the workers computed."""

import torch
from torch.nn import functional

from unlearn.evaluation import intervals

STABLE = 2048  # images below which FID is too biased to be more than an indication
SPLITS = 10


def scores(
    real: torch.Tensor, made: torch.Tensor, classes: torch.Tensor | None, holes: dict[str, torch.Tensor], seed: int
) -> dict[str, float | int | None]:
    """One row of figures, None where a figure cannot be given; FIGURE_low and FIGURE_high are ends of an interval.

    real, made: (N, D) features of the originals and of the reconstructions, row for row; classes: (N, C) class scores
    of the reconstructions; holes: of each reconstruction "errors", the (N,) mean squared error in the hole, pixels in
    [0, 1], and "ssim", likewise; where it was measured also "lpips", of the whole image.
    """
    score, score_std = inception_score(classes, seed) if classes is not None else (None, None)
    similar = cosine(made, real)
    row: dict[str, float | int | None] = {
        "images": len(made), "fid": fid(real, made), "is": score, "is_std": score_std,
        "cosine": float(similar.mean()), "cosine_std": float(similar.std(correction=0)), "psnr": psnr(holes["errors"]),
        "ssim": float(holes["ssim"].mean()),
    }  # fmt: skip
    distance = intervals.kid(real, made, seed)
    found = {
        "cosine": intervals.of_mean(similar, seed, lambda means: means),
        "psnr": intervals.of_mean(holes["errors"], seed, _decibels),
        "ssim": intervals.of_mean(holes["ssim"], seed, lambda means: means),
        "kid": None if distance is None else distance[1:],
    }
    row["kid"] = None if distance is None else distance[0]
    if "lpips" in holes:
        row["lpips"] = float(holes["lpips"].double().mean())
        found["lpips"] = intervals.of_mean(holes["lpips"], seed, lambda means: means)
    for name, interval in found.items():
        row[f"{name}_low"], row[f"{name}_high"] = interval or (None, None)
    return row


def fid(real: torch.Tensor, made: torch.Tensor) -> float | None:
    """Fréchet distance of two sets of features (N, D) and (M, D), in float64; None for fewer than two images."""
    if min(len(real), len(made)) < 2:
        return None
    factors = [_factor(features) for features in (real, made)]
    apart = (real.double().mean(0) - made.double().mean(0)).square().sum()
    # The trace of the square root of the product of the covariances A'A and B'B: the singular values of AB', summed.
    common = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return max(float(apart + sum(factor.square().sum() for factor in factors) - 2 * common), 0.0)


def _factor(features: torch.Tensor) -> torch.Tensor:
    """A matrix A of at most D rows with the covariance A'A of features (N, D): few images make a small one, which is
    much quicker than the covariance itself."""
    centred = (features.double() - features.double().mean(0)) / (len(features) - 1) ** 0.5
    return centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r").R


def inception_score(classes: torch.Tensor, seed: int) -> tuple[float, float | None]:
    """(mean, standard deviation) over ten splits of class scores (N, C), rows dealt to the splits by the seed.

    The splits differ by one row at most, as in the original code; one that is much smaller than the others would
    inflate the deviation. None where there is one split alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dealt = classes.double()[torch.randperm(len(classes))]
    scores = []
    for part in dealt.log_softmax(1).tensor_split(min(SPLITS, len(dealt))):
        marginal = part.exp().mean(0, keepdim=True).log()
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std()) if len(scores) > 1 else None


def cosine(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(N,) cosine of each reconstruction's features to those of its own original; 0 where a vector is zero."""
    return functional.cosine_similarity(made.double(), real.double())


def psnr(errors: torch.Tensor) -> float:
    """dB, from the mean of (N,) squared errors: pooled over the set, so one perfect image does not make it infinite.
    At most 100."""
    return float(_decibels(errors.double().mean()))


def _decibels(errors: torch.Tensor) -> torch.Tensor:
    return -10 * errors.clamp(min=1e-10).log10()


def hole_ssim(made: torch.Tensor, real: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(B,) float64 structural similarity (Wang et al., 2004: Gaussian window, sigma 1.5, 11 pixels) averaged over
    windows whose middle is hidden, so that those at the edge see what is visible beside it. made, real: (B, 3, S, S) in
    [0, 1]; hidden: (B, 1, S, S) bool.

    A window's mean is a product with a matrix from either side: torchmetrics' two-dimensional convolution, to which it
    is equal but for rounding, took a third of all measuring.
    """
    x, y = made.double(), real.double()
    window = _windows(x.shape[-1]).to(x.device)
    mean_x, mean_y, xx, yy, xy = (window.T @ pixels @ window for pixels in (x, y, x * x, y * y, x * y))
    squares, product = mean_x * mean_x + mean_y * mean_y, mean_x * mean_y
    variances = (xx - mean_x * mean_x).clamp_min(0) + (yy - mean_y * mean_y).clamp_min(0)
    every = (2 * product + 0.01**2) * (2 * (xy - product) + 0.03**2)
    every = every / ((squares + 0.01**2) * (variances + 0.03**2))
    return (every * hidden).sum((1, 2, 3)) / (3 * hidden.sum((1, 2, 3)))


def _windows(size: int) -> torch.Tensor:
    """(size, size) float64: the weights of each pixel of a line, in rows, in each window, in columns; the image is
    mirrored at its edges."""
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    weights = (-((offsets / 1.5) ** 2) / 2).exp()
    mirrored = functional.pad(torch.eye(size, dtype=torch.float64)[None], (5, 5), mode="reflect")[0]
    return mirrored.unfold(1, 11, 1) @ (weights / weights.sum())


def hole_errors(made: torch.Tensor, real: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(B,) float64 mean squared error over the hidden pixels. made, real: (B, 3, S, S) in [0, 1]; hidden: (B, 1, S, S)
    bool."""
    squares = (made.double() - real.double()).square() * hidden
    return squares.sum((1, 2, 3)) / (3 * hidden.sum((1, 2, 3)))
