"""Decoded images in a file that all processes of a machine map, so that each image is decoded once a machine and its
pixels are in memory once.

    /dev/shm/unlearn-UID/pixels/KEY/pixels    the images one behind the other, in the order in which they were decoded
                                    index     what is taken of `pixels`, and of each row its state, place and shape

KEY is a hash of all that decides the pixels: the shards' content, the size, and the code that decodes and scales. The
files are on disk (TMPDIR) where shared memory is small. The folder is that of `node_cache.shared`: only its user can
enter, the last process that uses it deletes it, and what killed processes have left goes when the next one opens such a
file.

A row is claimed under a lock, then its pixels are written, then its state says so. Nobody reads a row that is not
ready, and nobody writes a row twice, so a process may be killed anywhere: at worst one image has lost its place.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import os
import tempfile
import threading
import weakref
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from unlearn.data import node_cache
from unlearn.data.storage import told
from unlearn.errors import StorageError

log = logging.getLogger(__name__)

MEMORY = "/dev/shm"
VERSION = 1  # of the files, and of decode.py and scaling.py where their pixels change
EMPTY, CLAIMED, READY = 0, 1, 2
HEAD = 4096  # bytes in front of the index's columns; the first eight are how much of `pixels` is taken
COLUMNS = (("states", np.uint8), ("heights", np.uint32), ("widths", np.uint32), ("places", np.uint64))
ROW = sum(np.dtype(kind).itemsize for _, kind in COLUMNS)  # bytes of the index for one row

_open: weakref.WeakValueDictionary[Path, "Pixels"] = weakref.WeakValueDictionary()
_users: Counter[Path] = Counter()
_mutex = threading.RLock()  # a finalizer may run in the middle of anything


class Pixels:
    """The decoded images of one set of shards in one size, by row of the manifest. Safe from many threads and
    processes.

    Made by `shared`. data: all of `pixels`, (bytes,) uint8, read-only.
    """

    def __init__(self, folder: Path, rows: int):
        self._file = os.open(folder / "pixels", os.O_RDWR)
        self._index_file = os.open(folder / "index", os.O_RDWR)
        self._owner, self._lock, self._full = os.getpid(), threading.Lock(), False
        self.data = np.frombuffer(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ), np.uint8)
        index = mmap.mmap(self._index_file, 0)
        self._taken = np.frombuffer(index, np.int64, 1)
        columns, start = {}, HEAD
        for name, kind in reversed(COLUMNS):  # the widest first, so that each is aligned
            columns[name] = np.frombuffer(index, kind, rows, start)
            start += columns[name].nbytes
        self.states, self._places = columns["states"], columns["places"]
        self._heights, self._widths = columns["heights"], columns["widths"]
        weakref.finalize(self, _close, self._file, self._index_file, folder)

    @property
    def bytes(self) -> int:
        """Bytes that the images take now, those of all processes."""
        return int(self._taken[0])

    def get(self, row: int) -> np.ndarray | None:
        """(H, W, 3) uint8, read-only, of a row that is there; None for others."""
        if self.states[row] != READY:
            return None
        place, height, width = int(self._places[row]), int(self._heights[row]), int(self._widths[row])
        return self.data[place : place + 3 * height * width].reshape(height, width, 3)

    def gather(self, rows: np.ndarray, made: np.ndarray) -> bool:
        """Copy the images of `rows` into `made`, (rows, S, S, 3), at once; whether all are there. All must be of one
        size."""
        if not (self.states[rows] == READY).all():
            return False
        each = made[0].nbytes
        images = self.data[: len(self.data) // each * each].reshape(-1, each)
        np.take(images, (self._places[rows] // each).astype(np.int64), 0, made.reshape(len(rows), each), "clip")
        return True

    def claim(self, row: int, size: int, room: int) -> int | None:
        """The place where this process alone writes a row of `size` bytes; None where that row is taken, or there is no
        room.

        room: bytes that all images together may take.
        """
        if self._full or os.getpid() != self._owner:  # a forked child shares the lock of its parent
            return None
        with self._lock:
            fcntl.flock(self._index_file, fcntl.LOCK_EX)
            try:
                place = int(self._taken[0])
                if self.states[row] != EMPTY or place + size > min(room, len(self.data)):
                    return None
                self.states[row] = CLAIMED
                self._taken[0] = place + size
                return place
            finally:
                fcntl.flock(self._index_file, fcntl.LOCK_UN)

    def write(self, row: int, image: np.ndarray, place: int) -> bool:
        """Keep (H, W, 3) uint8 of a row at its claimed place; whether it is there now."""
        try:
            view, done = np.ascontiguousarray(image).data.cast("B"), 0
            while done < len(view):
                done += os.pwrite(self._file, view[done:], place + done)
        except OSError as e:
            self._full = True
            log.warning("decoded images are no longer kept: %s; lower data.cache_bytes", e.strerror)
            return False
        self._places[row], self._heights[row], self._widths[row] = place, *image.shape[:2]
        self.states[row] = READY
        return True


def shared(content: str, orientation: str, size: int | None, rows: int, room: int) -> Pixels:
    """The decoded images that this machine's processes share.

    content: hash of the shards; size: side of the images, None where they are kept whole; rows: how many the shards
    have; room: the most bytes that the images may ever take. Raises StorageError where no private folder can be made.
    """
    packages = [version(name) for name in ("torch", "simplejpeg", "pillow")]
    key = hashlib.sha256(json.dumps([VERSION, content, orientation, size, packages]).encode()).hexdigest()[:32]
    folder = _root(room) / key

    def fill(part: Path) -> None:
        for name, length in (("pixels", room), ("index", HEAD + ROW * rows)):
            with open(part / name, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.truncate(length)  # holes, which take no memory before they are written

    with _mutex:
        pixels = _open.get(folder)
        if pixels is None:
            _users[folder] += 1
            try:
                node_cache.shared(folder, fill)
                with told(str(folder)):
                    pixels = _open[folder] = Pixels(folder, rows)
            except BaseException:
                _leave(folder)
                raise
        return pixels


def sweep() -> None:
    """Delete what killed processes have left."""
    for parent in (MEMORY, tempfile.gettempdir()):
        folder = Path(parent, f"unlearn-{os.getuid()}", "pixels")
        if folder.is_dir() and folder.stat().st_uid == os.getuid():
            node_cache.sweep(folder)


def _root(room: int) -> Path:
    """In shared memory where that is twice as large as what may be kept, so that all processes of a machine choose
    alike."""
    try:
        memory = os.statvfs(MEMORY)
        if memory.f_blocks * memory.f_frsize >= 2 * room and os.access(MEMORY, os.W_OK):
            return node_cache.private("pixels", MEMORY)
    except (OSError, StorageError):  # it is not there, or another user has taken the name
        pass
    return node_cache.private("pixels")


def _close(file: int, index: int, folder: Path) -> None:
    os.close(file)
    os.close(index)
    with _mutex:
        _leave(folder)


def _leave(folder: Path) -> None:
    _users[folder] -= 1
    if not _users[folder]:
        del _users[folder]
        node_cache.release(folder)
