"""The figures of one set under one view, FID, KID, IS, cosine, PSNR, SSIM and LPIPS, from what the workers computed."""

import torch
from torch.nn import functional

from unlearn.evaluation import intervals
from unlearn.evaluation.distributions import frechet, inception_score

STABLE = 2048  # images below which FID is too biased to be more than an indication


def scores(
    real: torch.Tensor, made: torch.Tensor, classes: torch.Tensor | None, holes: dict[str, torch.Tensor], seed: int
) -> dict[str, float | int | None]:
    """One row of figures, None where a figure cannot be given; FIGURE_low and FIGURE_high are ends of an interval.

    real, made: (N, D) features of the originals and of the reconstructions, row for row; classes: (N, C) class scores
    of the reconstructions; holes: of each reconstruction "errors", the (N,) mean squared error in the hole, pixels in
    [0, 1], and "ssim", likewise; where it was measured also "lpips", of the whole image.
    """
    score, score_std, score_interval = inception_score(classes, seed) if classes is not None else (None, None, None)
    apart, similar = frechet(real, made), cosine(made, real)
    row: dict[str, float | int | None] = {
        "images": len(made), "fid": apart and apart[0], "is": score, "is_std": score_std,
        "cosine": float(similar.mean()), "cosine_std": float(similar.std(correction=0)), "psnr": psnr(holes["errors"]),
        "ssim": float(holes["ssim"].mean()),
    }  # fmt: skip
    distance = intervals.kid(real, made, seed)
    of_each = None if apart is None else apart[0] + apart[1] + apart[2]
    found = {
        "cosine": intervals.of_mean(similar, seed, lambda means: means),
        "psnr": intervals.of_mean(holes["errors"], seed, _decibels),
        "ssim": intervals.of_mean(holes["ssim"], seed, lambda means: means),
        "kid": None if distance is None else distance[1:],
        "fid": None if of_each is None else intervals.of_mean(of_each, seed, lambda means: means.clamp(min=0)),
        "is": score_interval,
    }
    row["kid"] = None if distance is None else distance[0]
    if "lpips" in holes:
        row["lpips"] = float(holes["lpips"].double().mean())
        found["lpips"] = intervals.of_mean(holes["lpips"], seed, lambda means: means)
    for name, interval in found.items():
        row[f"{name}_low"], row[f"{name}_high"] = interval or (None, None)
    return row


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
