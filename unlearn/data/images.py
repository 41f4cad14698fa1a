"""The images of a set by row number, decoded and cached; damaged ones are counted."""

import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from unlearn import config
from unlearn.data import selection, shards
from unlearn.data.cache import ENTRY, ImageCache
from unlearn.data.decode import decode
from unlearn.data.scaling import fit
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage
from unlearn.errors import DataError, ImageError

READS = 8  # row groups of S3 that a set reads at the same time


class Images:
    """Random access to the images of one RowSet. Safe from many threads.

    size: every image is cut to (size, size, 3); None: images keep the size in which they are stored.
    cache: shared by the sets of a worker. With `data.cache: decoded` it keeps the returned arrays, once for all
    processes of the machine: an image cut to size takes 3 * size**2 bytes whatever its original size. Where every
    epoch draws a new crop, images must be cached whole (size=None), since a crop of a scaled image has other pixels.
    """

    def __init__(self, rows: RowSet, data: config.Data, cache: ImageCache, size: int | None = None):
        self.set, self.data, self.cache, self.size = rows, data, cache, size
        self.bad: dict[int, str] = {}
        self._shelf = cache.shelf(self.shelf(rows, data, size))
        if data.cache == "decoded":
            cache.open_pixels(self._shelf, rows.manifest, data.orientation, size)
        self._offered: set[int] = set()  # row groups whose images were offered to the cache
        self._locks = [threading.Lock() for _ in rows.manifest.groups]
        self._lock = threading.Lock()
        # A thread of it ends with it.
        self._remote = None if Storage(rows.manifest.uri).is_local() else ThreadPoolExecutor(READS, "fetch")

    @staticmethod
    def shelf(rows: RowSet, data: config.Data, size: int | None) -> Hashable:
        """The shelf of a cache that holds these images: one for all sets of the same shards."""
        return rows.manifest.uri, rows.manifest.hash, data.cache, data.orientation, size

    def __getitem__(self, row: int) -> np.ndarray:
        """The decoded image of a row, (size, size, 3) or (H, W, 3) uint8, read-only where it is cached. Raises
        ImageError if it is damaged."""
        return self._image(row, None)

    def _image(self, row: int, out: np.ndarray | None) -> np.ndarray:
        """As above. out: (size, size, 3), to which an image that is decoded now is written."""
        entry = self.read(row)
        if isinstance(entry, np.ndarray):
            return entry
        image = self._fit(self._decode(entry), out)
        if self.data.cache == "decoded":
            self.cache.keep_decoded(self._shelf, row, image)
        return image

    def _decode(self, stored: bytes | memoryview) -> np.ndarray:
        return decode(stored, self.data.orientation)

    def _fit(self, image: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        return image if self.size is None else fit(image, self.size, out)

    def sound(self, row: int, out: np.ndarray | None = None) -> np.ndarray:
        """The decoded image of a row, or of its replacement row where it is damaged; `out` itself, (size, size, 3),
        where it is written there already."""
        while True:
            try:
                return self._image(row, out)
            except ImageError as e:
                row = self.skip(row, e)

    def gather(self, rows: np.ndarray, made: np.ndarray) -> None:
        """Put the images of `rows`, or their replacements, into `made`, (rows, size, size, 3) uint8."""
        shared = self._shelf.pixels
        if shared is None or not shared.gather(rows, made):
            self.fetch(rows)
            for place, row in enumerate(rows.tolist()):
                to = made[place]
                if (image := self.sound(row, to)) is not to:
                    to[:] = image

    def read(self, row: int) -> bytes | memoryview | np.ndarray:
        """The decoded image of a row where the cache has it, else its bytes as they are stored."""
        entry = self._shelf.get(row)
        if entry is not None:
            return entry
        manifest = self.set.manifest
        group = int(np.searchsorted(manifest.starts, row, side="right") - 1)
        with self._locks[group]:
            entry = self._shelf.get(row)
            if entry is not None:  # kept by another thread while this one waited for the lock
                return entry
            return self._stored(group)[row - int(manifest.starts[group])]

    def fetch(self, rows: np.ndarray) -> None:
        """Read the row groups of these rows from S3, several at a time: one after another, each would wait for the
        answers to the one before. No more than this thread's part of what the cache may take for row groups; the others
        are read when they are needed. Raises DataError, StorageError."""
        manifest = self.set.manifest
        if self._remote is None:
            return
        missing = [row for row in rows.tolist() if not self._shelf.holds(row)]
        room, groups = self.cache.row_groups.limit // (2 * self.data.decode_threads), []
        for group in dict.fromkeys(manifest.group_of(np.array(missing, np.int64)).tolist()):
            if self._place(group) not in self.cache.row_groups:
                room -= manifest.row_group(group).bytes
                groups += [group] if room >= 0 else []
        if len(groups) > 1:
            for _ in self._remote.map(self._fetched, groups):
                pass

    def _place(self, group: int) -> Hashable:
        """Where the cache has a row group: the splits of a folder have one URI, and other row groups of one number."""
        return self.set.manifest.uri, self.set.manifest.hash, group

    def _fetched(self, group: int) -> None:
        with self._locks[group]:
            self._stored(group)

    def _stored(self, group: int) -> list[memoryview]:
        """The stored images of a row group, read where they are not at hand; its lock is held."""
        stored = self.cache.row_groups.get(self._place(group), lambda: self._row_group(group))
        if self.data.cache != "none" and group not in self._offered:
            self._offer(group, stored)
        return stored

    def _row_group(self, group: int) -> tuple[list[memoryview], int]:
        """(the stored images of a row group, bytes of memory that they take)."""
        table = self.set.manifest.read(group, ["image"])
        views, size = list(shards.images(table)), table.get_total_buffer_size() + ENTRY * len(table)
        if self.data.cache != "none":
            return views, size
        # These stay: copied, so that Arrow reads the next row group into memory that it has used before, which costs
        # less than new memory does.
        return [memoryview(bytes(view)) for view in views], size

    def _offer(self, group: int, stored: list[memoryview]) -> None:
        """Copy the chosen rows of a row group into the cache while it has room, so that the row group is not read
        again.

        Copies, since a view into the row group would keep all of it in memory.
        """
        first = int(self.set.manifest.starts[group])
        # Numbers of the rows' own type: else all of them would be copied into a wider one.
        low, high = np.searchsorted(self.set.rows, np.array((first, first + len(stored)), self.set.rows.dtype))
        with self._shelf.lock:
            rows = self.set.rows[low:high].tolist()
            kept = all(self.cache.keep(self._shelf, row, stored[row - first]) for row in rows)
        if kept:
            self.cache.row_groups.drop(self._place(group))
        self._offered.add(group)

    def skip(self, row: int, error: Exception) -> int:
        """Count a damaged image; returns its replacement row. Raises DataError past the limit."""
        with self._lock:
            if row not in self.bad:
                self.bad[row] = selection.name_row(self.set.manifest, row)
            if len(self.bad) > self.data.max_bad_images or len(self.bad) == len(self.set):
                names = ", ".join(list(self.bad.values())[:5])
                raise DataError(
                    f"{len(self.bad)} image(s) of {self.set.manifest.uri} do not decode: {names} ({str(error)[:80]}). "
                    f"Mend them, or raise data.max_bad_images (now {self.data.max_bad_images})"
                )
        return int(self.set.rows[(np.searchsorted(self.set.rows, row) + 1) % len(self.set)])
