"""Make the shards of unlearn/embedded from the Fashion-MNIST files of the Debian package `dataset-fashion-mnist`.

    python infra/embed_fashion_mnist.py /usr/share/dataset-fashion-mnist unlearn/embedded

Takes the first 500 training and the first 100 test images of each class, in the files' order, pads them to 32 pixels
and keeps them as PNG, so nothing is lost. Identical bytes each time.
"""

import gzip
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from unlearn.data import packing

CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def idx(path: Path, header: int) -> np.ndarray:
    """The values of a gzipped IDX file behind its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def png(image: np.ndarray) -> bytes:
    """A 28-pixel grey image, two pixels of black around it, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.pad(image, 2)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(source: str, dest: str) -> None:
    for split, prefix, each in (("train", "train", 500), ("test", "t10k", 100)):
        images = idx(Path(source) / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = idx(Path(source) / f"{prefix}-labels-idx1-ubyte.gz", 8)
        records = (
            {"image": png(images[i]), "label": label, "id": f"{split}-{i:05d}"}
            for label in range(10)
            for i in np.flatnonzero(labels == label)[:each]
        )
        packing.write(records, f"{dest}/fashion-{split}", CLASSES, rows_per_group=500)


if __name__ == "__main__":
    main(*sys.argv[1:])
