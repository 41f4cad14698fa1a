"""Grey images of more than 8 bits, scaled to 8."""

import numpy as np
from PIL import Image

from unlearn.errors import ImageError

BITS, WHITE_IS_ZERO = 258, 262  # TIFF tags: bits of a value, photometric interpretation


def eight_bits(image: Image.Image) -> np.ndarray:
    """(H, W) uint8 of a loaded image of mode I;16 (16 bits), I (32) or F (float). Raises ImageError."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = (values >> (tags.get(BITS, (16,))[0] - 8)).astype(np.uint8)
    else:
        if not np.isfinite(values).all():
            raise ImageError("holds values that are not finite")
        values = values.astype(np.float64)
        black, white = _range(values.min(), values.max(), image.mode == "I")
        grey = ((values - black) * (255 / (white - black) if white > black else 0)).round().astype(np.uint8)
    return 255 - grey if tags.get(WHITE_IS_ZERO) == 0 else grey


def _range(low: float, high: float, whole: bool) -> tuple[float, float]:
    """The values that are black and white: of the smallest usual range that holds all values, else the image's own."""
    if whole:
        top = 255 if high <= 255 else 65535
    else:
        top = 1 if high < 2 else 255  # 1.02 is a little above 1, and not nearly black
    return (0, top) if low >= 0 and high <= top else (low, high)
