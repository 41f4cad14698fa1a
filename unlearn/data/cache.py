"""What one worker keeps of its data in memory, within `data.cache_bytes`; decoded images are kept once a machine."""

import os
import threading
from collections.abc import Hashable, Mapping

import numpy as np

from unlearn import config, sizes
from unlearn.data import pixels
from unlearn.data.pixels import Pixels
from unlearn.data.recent import Recent
from unlearn.data.selection import RowSet
from unlearn.data.shards import Manifest

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
    workers = _sharing(workers)
    if data.cache_bytes is not None:
        return data.cache_bytes // (workers if data.cache == "decoded" else 1)
    return default_limit(sizes.host_memory() // workers)


def default_limit(memory: int) -> int:
    """The limit of a worker that has `memory` bytes of its machine to itself."""
    return min(DEFAULT, memory // 4)


def image_cache(data: config.Data, workers: int, share: float = 1) -> "ImageCache":
    """The cache of a worker, with this share of its limit; workers: as in `limit`."""
    together = _sharing(workers) if data.cache == "decoded" else 1
    return ImageCache(int(limit(data, workers) * together * share), together)


def _sharing(workers: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", workers))


class ImageCache:
    """The bytes that all sets of a worker share: at most three quarters of them for single images, the rest for row
    groups read recently.

    Single images are added while there is room, and then stay: an epoch reads every image once, so a cache that
    evicts the least recently used would evict each one shortly before its next use. Row groups are used for some
    time and then not before the next epoch, so there the least recently used are evicted. Not counted in the limit
    are the newest row group, those that threads still read from, and of each thread an image as it is stored while its
    decoded one takes its place.

    workers: how many processes of this machine have such a cache and `limit` bytes together. The decoded images are
    theirs in common; of what is left each takes a part for the images that are still to be decoded, and for row groups.
    """

    def __init__(self, limit: int, workers: int = 1):
        self.limit, self.workers, self.room = limit, workers, limit - limit // 4
        self.row_groups = Recent(limit // workers)
        self._stored, self._lock = 0, threading.Lock()
        self._dropped = 0  # bytes of decoded images when those that others had decoded were last dropped
        self._shelves: dict[Hashable, Shelf] = {}

    def shelf(self, key: Hashable) -> "Shelf":
        """The images of that key; the same shelf for everyone who asks for it."""
        with self._lock:
            return self._shelves.setdefault(key, Shelf())

    def open_pixels(self, shelf: "Shelf", manifest: Manifest, orientation: str, size: int | None) -> None:
        """Let the shelf keep decoded images, where there is room for one."""
        if shelf.pixels is None and self.room > 3 * (size or 0) ** 2:
            shelf.pixels = pixels.shared(manifest.hash, orientation, size, int(manifest.starts[-1]), self.room)

    def make_room(self, wanted: Mapping[Hashable, np.ndarray]) -> None:
        """Drop the images that are not wanted (rows by shelf), where more than half of the room is taken.

        Decoded ones are dropped where most are not wanted, all of a shelf together, and stay while other processes use
        them.
        """
        if self.decoded + self.workers * self._stored <= self.room // 2:
            return
        for key, shelf in self._shelves.items():
            rows = np.unique(np.asarray(wanted.get(key, ()), np.int64))
            with shelf.lock:
                held = np.fromiter(shelf.images, np.int64, len(shelf.images))
                self._drop(shelf, held[~np.isin(held, rows)])
                if shelf.pixels is not None:
                    ready = shelf.pixels.states == pixels.READY
                    if 2 * np.count_nonzero(ready[rows]) < max(np.count_nonzero(ready), 1):
                        shelf.pixels = None

    @property
    def decoded(self) -> int:
        """Bytes of the decoded images, those of all processes."""
        return sum(shelf.pixels.bytes for shelf in list(self._shelves.values()) if shelf.pixels is not None)

    @property
    def bytes(self) -> int:
        """Bytes held now: the decoded images, and what is this process's own."""
        with self._lock:
            return self.decoded + self._stored + self.row_groups.bytes

    def keep(self, shelf: "Shelf", row: int, stored: memoryview) -> bool:
        """Keep a copy of an image as it is stored; whether the row is cached now. `shelf.lock` is held."""
        if shelf.holds(row):
            return True
        if self._admit(ENTRY + len(stored)):
            shelf.images[row] = bytes(stored)
        return row in shelf.images

    def keep_decoded(self, shelf: "Shelf", row: int, image: np.ndarray) -> None:
        """Keep a decoded image in place of the stored one."""
        if (shared := shelf.pixels) is None:
            return
        stored = entry_bytes(shelf.images.get(row))
        with self._lock:
            others = self.decoded - shared.bytes + self.workers * (self._stored - stored)
            place = shared.claim(row, image.nbytes, self.room - others)
            self._resize()
        if place is not None and shared.write(row, image, place):
            with shelf.lock:
                self._drop(shelf, [row])
        if self.decoded - self._dropped > self.room // 16:
            self._drop_decoded()

    def _drop_decoded(self) -> None:
        """Drop the stored images that other processes have decoded meanwhile."""
        self._dropped = self.decoded
        for shelf in list(self._shelves.values()):
            with shelf.lock:
                if shelf.pixels is not None and shelf.images:
                    held = np.fromiter(shelf.images, np.int64, len(shelf.images))
                    self._drop(shelf, held[shelf.pixels.states[held] == pixels.READY])

    def _drop(self, shelf: "Shelf", rows: np.ndarray | list[int]) -> None:
        size = sum(entry_bytes(shelf.images.pop(int(row), None)) for row in rows)
        with self._lock:
            self._stored -= size
            self._resize()

    def _admit(self, size: int) -> bool:
        with self._lock:
            if self.decoded + self.workers * (self._stored + size) > self.room:
                return False
            self._stored += size
            self._resize()
            return True

    def _resize(self) -> None:
        self.row_groups.resize((self.limit - self.decoded) // self.workers - self._stored)


class Shelf:
    """Single images by row number: as they are stored, or decoded; `lock` is held to change them."""

    def __init__(self):
        self.images: dict[int, bytes] = {}
        self.pixels: Pixels | None = None
        self.lock = threading.Lock()

    def get(self, row: int) -> bytes | np.ndarray | None:
        """What there is of a row, decoded rather than stored."""
        shared = self.pixels
        image = None if shared is None else shared.get(row)
        return self.images.get(row) if image is None else image

    def holds(self, row: int) -> bool:
        """Whether there is anything of the row."""
        return row in self.images or self.ready(row)

    def ready(self, row: int) -> bool:
        """Whether the row is decoded."""
        shared = self.pixels
        return shared is not None and bool(shared.states[row] == pixels.READY)


def entry_bytes(stored: bytes | None) -> int:
    """Bytes of memory that one stored image takes."""
    return 0 if stored is None else ENTRY + len(stored)


def stored_bytes(rows: RowSet) -> int:
    """About how many bytes the chosen rows take as they are stored: each has an equal share of its row group."""
    return int((_row_group_bytes(rows) * rows.counts / np.diff(rows.manifest.starts).clip(1)).sum())


def needed_bytes(sets: dict[str, RowSet], data: config.Data, size: int, workers: int = 1) -> int | None:
    """About how many bytes the cache of a worker takes where it has room for everything; None where the manifest cannot
    tell.

    size: side of the model's images; workers: among whom decoded images are shared.
    """
    images = sum(map(len, sets.values()))
    manifests = {(rows.manifest.uri, rows.manifest.hash): rows.manifest for rows in sets.values()}
    if data.cache == "none":  # row groups are kept whole, and once for all sets
        touched = {
            ((rows.manifest.uri, rows.manifest.hash), group)
            for rows in sets.values()
            for group in rows.touched.tolist()
        }
        row_groups = [manifests[which].row_group(group) for which, group in touched]
        return sum(each.bytes + ENTRY * each.rows for each in row_groups)
    stored = sum(map(stored_bytes, sets.values())) + ENTRY * images
    if data.cache == "encoded":
        return stored
    # An image is kept as it is stored until it is decoded. With crop_flip it is then kept whole, at a size that is not
    # known before.
    if data.augment != "none":
        return None
    index = sum(pixels.ROW * int(manifest.starts[-1]) for manifest in manifests.values())
    return max(stored, (images * 3 * size * size + index) // workers)


def in_use(sets: dict[str, RowSet], data: config.Data) -> int:
    """About how many bytes the row groups have that are read from at one time: reading ahead starts the next shuffle
    window before the current one is done."""
    touched = ((_row_group_bytes(rows)[rows.touched].sum(), len(rows)) for rows in sets.values())
    return int(sum(size * min(1, 2 * data.shuffle_rows / count) for size, count in touched))


def _row_group_bytes(rows: RowSet) -> np.ndarray:
    """Bytes of every row group of the manifest."""
    return rows.manifest.facts["bytes"]
