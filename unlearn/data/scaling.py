"""Decoded images brought to the size that a model sees, for training and measuring alike.

Scaling is bicubic with antialiasing (a = -0.5), in integers. Torch's pixels are at most 2 of 255 away from PIL's where
both axes are scaled alike, for a fifth to a tenth of the time.
"""

import numpy as np
import torch
from PIL import Image

NARROW = 16  # longer side / shorter side from which an image is cut before it is scaled


def fit(image: np.ndarray, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """(size, size, 3) of (H, W, 3) uint8: the shorter side is scaled to `size`, and the middle is cut out.

    out: (size, size, 3) uint8 to write to, where it is wanted at a place of its own.
    """
    height, width = image.shape[:2]
    if height == width == size and out is None:
        return image
    made = np.empty((size, size, 3), np.uint8) if out is None else out
    scale = size / min(height, width)
    wide, high = max(round(width * scale), size), max(round(height * scale), size)
    left, top = (wide - size) // 2, (high - size) // 2
    if height == width == size:
        made[:] = image
    elif wide == high:
        scaled(image, size, size, made)
    elif max(wide, high) <= NARROW * size:
        made[:] = scaled(image, high, wide)[top : top + size, left : left + size]
    else:
        # The whole of a narrow image would be large, once scaled. PIL scales a part that begins between two pixels.
        x, y = width / wide, height / high
        box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
        made[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
    return made


def crop_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) of (H, W, 3) uint8: a random crop of 0.2 to 1 of the area, aspect ratio 3/4 to 4/3, scaled to
    `size`, and flipped left to right half of the time."""
    height, width = image.shape[:2]
    area = height * width * rng.uniform(0.2, 1)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w = min(max(round((area * aspect) ** 0.5), 1), width)
    h = min(max(round((area / aspect) ** 0.5), 1), height)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    cropped = scaled(image[y : y + h, x : x + w], size, size)
    return cropped[:, ::-1] if rng.random() < 0.5 else cropped


def scaled(image: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """(height, width, 3) uint8 of (H, W, 3) uint8; out: of that shape, to write to."""
    made = np.empty((height, width, 3), np.uint8) if out is None else out
    # torch takes arrays that may be written to. Written where it is wanted, the channels last: interpolate() would give
    # them first, and they would be moved once more.
    whole = np.require(image, requirements=["C", "W"])
    torch.ops.aten._upsample_bicubic2d_aa.out(
        _channels_first(whole), (height, width), False, None, out=_channels_first(made)
    )
    return made


def _channels_first(image: np.ndarray) -> torch.Tensor:
    """The same memory as (1, 3, H, W)."""
    return torch.from_numpy(image[None]).permute(0, 3, 1, 2)
