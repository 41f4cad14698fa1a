"""From the bytes of an encoded image to the pixels that a model sees."""

import io

import numpy as np
import simplejpeg
from PIL import Image


def decode(data: memoryview | bytes) -> np.ndarray:
    """(H, W, 3) uint8 of an encoded image. Raises ValueError or OSError where it is damaged."""
    if bytes(data[:2]) == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # rare colour spaces that only PIL converts; real damage fails there too
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (SyntaxError, Image.DecompressionBombError) as e:  # from PIL, for some broken PNGs, and for absurd sizes
        raise ValueError(str(e)) from None


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """(size, size, 3) of (H, W, 3): the shorter side is scaled to `size` (bicubic), and the middle is cut out."""
    height, width = image.shape[:2]
    if height == width == size:
        return image
    scale = size / min(height, width)
    wide, high = max(round(width * scale), size), max(round(height * scale), size)
    scaled = Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def crop_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) of (H, W, 3): a random crop of 0.2 to 1 of the area, aspect ratio 3/4 to 4/3, scaled to `size`
    (bicubic), and flipped left to right half of the time."""
    height, width = image.shape[:2]
    area = height * width * rng.uniform(0.2, 1)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w = min(max(round((area * aspect) ** 0.5), 1), width)
    h = min(max(round((area / aspect) ** 0.5), 1), height)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    scaled = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    return np.asarray(scaled)[:, ::-1] if rng.random() < 0.5 else np.asarray(scaled)
