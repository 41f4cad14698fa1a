"""The same image twice: in the forget and in the retain set, within a folder or between two.

Beside a manifest stands a file of one checksum for each image, in the order of the rows: the 8 bytes of a BLAKE2b
digest as little-endian numbers. Images of equal checksums are taken for equal. Where an id stands twice, the image
counts as the same too.
"""

import hashlib
import logging

import numpy as np

from unlearn.data.manifest import Manifest
from unlearn.data.storage import Storage
from unlearn.errors import DataError

PIECE = 1 << 17  # rows that are compared at a time

log = logging.getLogger(__name__)


def checksum(image: memoryview | bytes) -> int:
    """Of one encoded image; 0 where there is none."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little") if len(image) else 0


def write(storage: Storage, split: str | None, checksums: np.ndarray) -> str:
    """Store the checksums of all images; the sha256 of what is stored."""
    data = checksums.astype("<u8").tobytes()
    storage.write(file_name(split), data)
    return hashlib.sha256(data).hexdigest()


def read(manifest: Manifest) -> np.ndarray | None:
    """(rows,) uint64; None where the manifest was made without. Raises DataError where the file is damaged."""
    if not manifest.images:
        return None
    storage, name = Storage(manifest.uri), file_name(manifest.split)
    data = storage.read(name) if storage.is_file(name) else b""
    if hashlib.sha256(data).hexdigest() != manifest.images:
        raise DataError(
            f"{storage.where(name)}: missing or damaged; make it anew with `unlearn shards index {manifest.uri}`"
        )
    return np.frombuffer(data, "<u8")


def file_name(split: str | None) -> str:
    return f"manifest-{split}.images" if split else "manifest.images"


def in_both(forget: tuple[Manifest, np.ndarray], retain: tuple[Manifest, np.ndarray]) -> np.ndarray:
    """Which rows of a retain set (manifest, rows) hold an image whose bytes stand in the forget set too: bool
    (rows,)."""
    manifests = {id(manifest): manifest for manifest, _ in (forget, retain)}  # one that is in both is read once
    there = {key: read(manifest) for key, manifest in manifests.items()}
    forgotten, retained = there[id(forget[0])], there[id(retain[0])]
    if forgotten is None or retained is None:
        lacking = forget[0] if forgotten is None else retain[0]
        log.info("%s: its manifest holds no checksums of images, so equal images in forget and retain are not looked "
                 "for; `unlearn shards index` adds them", lacking.uri)  # fmt: skip
        return np.zeros(len(retain[1]), bool)
    wanted, found = np.unique(forgotten[forget[1]]), np.zeros(len(retain[1]), bool)
    if not len(wanted):
        return found
    for start in range(0, len(found), PIECE):
        sums = retained[retain[1][start : start + PIECE]]
        place = np.searchsorted(wanted, sums).clip(max=len(wanted) - 1)
        found[start : start + PIECE] = (wanted[place] == sums) & (sums != 0)
    return found
