"""The same image twice: in the forget and in the retain set, within a folder or between two.

Beside a manifest stands a file of one checksum for each image, in the order of the rows: the 8 bytes of a BLAKE2b
digest as little-endian numbers. Images of equal checksums are taken for equal. Where an id stands twice, the image
counts as the same too.
"""

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from unlearn.data.manifest import Manifest
from unlearn.data.storage import Storage, local_copy
from unlearn.errors import DataError, StorageError

PIECE = 1 << 17  # rows that are compared at a time
SIZE = 8  # bytes of a checksum

log = logging.getLogger(__name__)


def checksum(image: memoryview | bytes) -> int:
    """Of one encoded image; 0 where there is none."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=SIZE).digest(), "little") if len(image) else 0


def write(storage: Storage, split: str | None, checksums: np.ndarray) -> str:
    """Store the checksums of all images; the sha256 of what is stored."""
    data = checksums.astype("<u8").tobytes()
    storage.write(file_name(split), data)
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _opened(manifest: Manifest) -> Iterator[BinaryIO | None]:
    """The file of checksums, compared with the manifest; None where that was made without. It is read piece by piece:
    of millions of images it is as large as all that is kept of them."""
    if not manifest.images:
        yield None
        return
    storage, name = Storage(manifest.uri), file_name(manifest.split)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(stack.enter_context(local_copy(storage.where(name))), "rb"))
        except StorageError:
            if storage.is_file(name):
                raise
            file = io.BytesIO()
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest.images:
            raise DataError(
                f"{storage.where(name)}: missing or damaged; make it anew with `unlearn shards index {manifest.given}`"
            )
        yield file


def _checksums(file: BinaryIO, manifest: Manifest, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(places in `rows`, which ascend, checksums of their images) piece by piece."""
    for first in range(0, manifest.rows, PIECE):
        span = np.array([first, first + PIECE]).clip(max=np.iinfo(rows.dtype).max).astype(rows.dtype)
        start, stop = np.searchsorted(rows, span).tolist()
        if start < stop:
            file.seek(SIZE * first)
            piece = np.frombuffer(file.read(SIZE * PIECE), "<u8")
            yield slice(start, stop), piece[rows[start:stop] - first]


def file_name(split: str | None) -> str:
    return f"manifest-{split}.images" if split else "manifest.images"


def in_both(forget: tuple[Manifest, np.ndarray], retain: tuple[Manifest, np.ndarray]) -> np.ndarray:
    """Which rows of a retain set (manifest, rows) hold an image whose bytes stand in the forget set too: bool
    (rows,)."""
    twice = np.zeros(len(retain[1]), bool)
    with contextlib.ExitStack() as stack:
        manifests = {id(manifest): manifest for manifest, _ in (forget, retain)}  # one that is in both is read once
        files = {key: stack.enter_context(_opened(manifest)) for key, manifest in manifests.items()}
        forgotten, retained = files[id(forget[0])], files[id(retain[0])]
        if forgotten is None or retained is None:
            lacking = forget[0] if forgotten is None else retain[0]
            log.info("%s: its manifest holds no checksums of images, so equal images in forget and retain are not "
                     "looked for; `unlearn shards index` adds them", lacking.uri)  # fmt: skip
            return twice
        wanted = np.unique(np.concatenate([np.empty(0, "<u8"), *(s for _, s in _checksums(forgotten, *forget))]))
        for place, sums in _checksums(retained, *retain) if len(wanted) else ():
            nearest = np.searchsorted(wanted, sums).clip(max=len(wanted) - 1)
            twice[place] = (wanted[nearest] == sums) & (sums != 0)
    return twice
