"""What one worker keeps of its data in memory, within `data.cache_bytes`."""

import os
import threading
from collections.abc import Hashable, Mapping

import numpy as np

from unlearn import config, sizes
from unlearn.data.recent import Recent
from unlearn.data.selection import RowSet
from unlearn.data.shards import Manifest, RowGroup

# What a worker's caches take at most where the configuration does not say: leaves room for several runs on one machine.
DEFAULT = 2 << 30
# Overhead in bytes of one cached image in Python: its objects and its dict entry.
ENTRY = 256


def limit(data: config.Data, workers: int) -> int:
    """Bytes that the caches of this worker may take together.

    The default depends on the memory of the machine, so it is computed where the worker runs and not written into
    the configuration.
    workers: how many may share this machine, where the environment (set by Ray Train) does not give it.
    """
    if data.cache_bytes is not None:
        return data.cache_bytes
    return default_limit(sizes.host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", workers)))


def default_limit(memory: int) -> int:
    """The limit of a worker that has `memory` bytes of its machine to itself."""
    return min(DEFAULT, memory // 4)


class ImageCache:
    """The bytes that all sets of a worker share: at most three quarters of them for single images, the rest for row
    groups read recently.

    Single images are added while there is room, and then stay: an epoch reads every image once, so a cache that
    evicts the least recently used would evict each one shortly before its next use. Row groups are used for some
    time and then not before the next epoch, so there the least recently used are evicted. Not counted in the limit
    are the newest row group and those that threads still read from.
    """

    def __init__(self, limit: int):
        self.limit, self.room = limit, limit - limit // 4
        self.row_groups = Recent(limit)
        self._images, self._lock = 0, threading.Lock()
        self._shelves: dict[Hashable, Shelf] = {}

    def shelf(self, key: Hashable) -> "Shelf":
        """The images of that key; the same shelf for everyone who asks for it."""
        with self._lock:
            return self._shelves.setdefault(key, Shelf())

    def make_room(self, wanted: Mapping[Hashable, np.ndarray]) -> None:
        """Drop the images that are not wanted (rows by shelf), where more than half of the room is taken."""
        if self._images <= self.room // 2:
            return
        for key, shelf in self._shelves.items():
            with shelf.lock:
                rows = np.fromiter(shelf.images, np.int64, len(shelf.images))
                for row in rows[~np.isin(rows, wanted.get(key, ()))].tolist():
                    self.admit(-entry_bytes(shelf.images.pop(row)))

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return self._images + self.row_groups.bytes

    def admit(self, size: int) -> bool:
        """Whether `size` more bytes of single images may be cached; negative where a smaller image replaces a larger
        one."""
        with self._lock:
            if size > 0 and self._images + size > self.room:
                return False
            self._images += size
            self.row_groups.resize(self.limit - self._images)
            return True


class Shelf:
    """Single images by row number, as they are stored or decoded; `lock` is held to change them."""

    def __init__(self):
        self.images: dict[int, bytes | np.ndarray] = {}
        self.lock = threading.Lock()


def entry_bytes(entry: bytes | np.ndarray | None) -> int:
    """Bytes of memory that one cached image takes."""
    if entry is None:
        return 0
    return ENTRY + (entry.nbytes if isinstance(entry, np.ndarray) else len(entry))


def stored_bytes(rows: RowSet) -> int:
    """About how many bytes the chosen rows take as they are stored: each has an equal share of its row group."""
    chosen = np.bincount(rows.groups, minlength=len(rows.manifest.groups))
    return int((_row_group_bytes(rows) * chosen / np.diff(rows.manifest.starts).clip(1)).sum())


def needed_bytes(sets: dict[str, RowSet], data: config.Data, size: int) -> int | None:
    """About how many bytes the cache takes where it has room for everything; None where the manifest cannot tell.

    size: side of the model's images.
    """
    images = sum(map(len, sets.values()))
    if data.cache == "none":  # row groups are kept whole, and once for all sets
        manifests = {rows.manifest.uri: rows.manifest for rows in sets.values()}
        touched = {(rows.manifest.uri, group) for rows in sets.values() for group in np.unique(rows.groups).tolist()}
        row_groups = [_row_group(manifests[uri], group) for uri, group in touched]
        return sum(each.bytes + ENTRY * each.rows for each in row_groups)
    stored = sum(map(stored_bytes, sets.values())) + ENTRY * images
    if data.cache == "encoded":
        return stored
    # An image is kept as it is stored until it is decoded. With crop_flip it is then kept whole, at a size that is not
    # known before.
    return max(stored, images * (3 * size * size + ENTRY)) if data.augment == "none" else None


def in_use(sets: dict[str, RowSet], data: config.Data) -> int:
    """About how many bytes the row groups have that are read from at one time: reading ahead starts the next shuffle
    window before the current one is done."""
    touched = ((_row_group_bytes(rows)[np.unique(rows.groups)].sum(), len(rows)) for rows in sets.values())
    return int(sum(size * min(1, 2 * data.shuffle_rows / count) for size, count in touched))


def _row_group_bytes(rows: RowSet) -> np.ndarray:
    """Bytes of every row group of the manifest."""
    return np.array([_row_group(rows.manifest, group).bytes for group in range(len(rows.manifest.groups))])


def _row_group(manifest: Manifest, group: int) -> RowGroup:
    shard, within = manifest.groups[group]
    return manifest.shards[shard].row_groups[within]
