"""Small images, encoded, and tables of them."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from unlearn.data import shards

CLASSES = ["ant", "bee", "cat", "dog"]


def encode(pixels: np.ndarray, format: str = "PNG", mode: str | None = None, **options) -> bytes:
    """An encoded image of (H, W) or (H, W, 3) pixels; mode: of PIL, where another is wanted."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def tiny_table(first: int, count: int) -> pa.Table:
    """Rows first .. first + count of the small data set: 12 images a class, every second one JPEG, sizes 28 to 40."""
    rng, rows = np.random.default_rng(first), []
    for i in range(first, first + count):
        pixels = rng.integers(0, 256, (28 + i % 13, 28 + (5 * i) % 13, 3), np.uint8)
        rows.append({"image": {"bytes": encode(pixels, "JPEG" if i % 2 else "PNG"), "path": None}, "label": i // 12,
                     "id": f"img-{i:03d}", "subject": f"person-{i % 5}"})  # fmt: skip
    return pa.Table.from_pylist(rows, shards.SCHEMA)
