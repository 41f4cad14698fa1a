"""Images written anew: scaled, and as JPEG, PNG or WebP."""

import io
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from unlearn.data.decode import Orientation, decode
from unlearn.data.scaling import scaled


def recoded(
    data: bytes, size: int | None, quality: int, lossless: Literal["png", "webp"] | None, orientation: Orientation
) -> bytes:  # fmt: skip
    """An encoded image of the same picture, a function of its arguments alone. Raises ImageError where it is damaged.

    size: what the shorter side is scaled to where it is longer; quality: of a JPEG, where it is not to be lossless.
    """
    image = decode(data, orientation)
    height, width = image.shape[:2]
    if size is not None and min(height, width) > size:
        scale = size / min(height, width)
        image = scaled(image, max(round(height * scale), size), max(round(width * scale), size))
    if lossless is None:
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")
    made = io.BytesIO()
    Image.fromarray(image).save(made, lossless.upper(), **({"lossless": True} if lossless == "webp" else {}))
    return made.getvalue()
