"""Folders that all processes of a machine share, and above all copies of remote files, so that the ranks of a machine
fetch weights once.

    $TMPDIR/unlearn-UID/copies/KEY/NAME    the copy; KEY: hash of URI, sizes and ETags (a changed object gets a new
                                           copy)
                               KEY.lock    a file lock: shared by every process that uses the copy, exclusive to fetch
                                           or delete
                               KEY.part/   being fetched, or deleted

The kernel releases the lock of a process however it ends. The copy of a killed process is used by the next process that
needs the same files, and deleted by the next that needs other files.
"""

import fcntl
import functools
import hashlib
import json
import multiprocessing.util
import os
import random
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from unlearn.data.facts import Facts
from unlearn.data.storage import Storage, download, told
from unlearn.errors import StorageError

_lock_files: dict[Path, int] = {}  # folder of a copy -> descriptor of its lock file, locked by this process
_mutex = threading.RLock()  # a finalizer that releases a folder may run in the middle of anything


def node_copy(uri: str, objects: dict[str, Facts] | None = None) -> Path:
    """A path at which a file or a folder can be read: its own, or that of the copy that this machine's processes share.

    The copy must not be modified. It stays until this process ends or calls `release`, and as long as another process
    uses it.
    objects: the objects to fetch, as from `Storage.objects`: saves another listing.
    Raises StorageError, also where those objects have changed since.
    """
    storage = Storage(uri)
    if storage.is_local():
        if not os.path.exists(storage.uri):
            raise StorageError(f"{uri}: there is no such file or folder")
        return Path(storage.uri)
    objects = storage.objects() if objects is None else objects
    content = [storage.uri, *sorted((name, facts.size, facts.etag) for name, facts in objects.items())]
    copy = private("copies") / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    return next(shared(copy, lambda folder: _fetch(storage, objects, folder)).iterdir())


def shared(folder: Path, fill: Callable[[Path], object]) -> Path:
    """The folder, which fill(an empty folder) has made in one of this machine's processes; its parent is from
    `private`.

    It stays until this process ends or calls `release`, and as long as another process uses it. Others in its
    parent, which no process uses, are deleted. Raises StorageError.
    """
    with _mutex, told(str(folder.parent)):
        if folder not in _lock_files:
            _at_exit()
            sweep(folder.parent, folder)
            _lock_files[folder] = _hold(folder, fill)
    return folder


def release(path: Path) -> None:
    """Release a copy from `node_copy`, or a folder from `shared`, for this whole process; the last process deletes
    it. Its memory maps stay valid."""
    with _mutex:
        for folder in (path, path.parent):
            if folder in _lock_files:
                _release(folder)


def _fetch(storage: Storage, objects: dict[str, Facts], folder: Path) -> None:
    download(storage, objects, folder)
    now = storage.objects()
    if changed := [name for name, facts in objects.items() if now.get(name) != facts]:
        raise StorageError(f"{storage.where(changed[0])} has changed since it was looked up: start again")


def _hold(copy: Path, fetch: Callable[[Path], object]) -> int:
    """An open lock file, locked shared, beside a whole copy, which is fetched if it is not there."""
    lock = copy.with_suffix(".lock")
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)  # waits while another process fetches
            if copy.exists():
                if _is(file, lock):
                    return file
            elif _exclusive(file) and _is(file, lock) and not copy.exists():
                _fill(copy, fetch)
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if not copy.exists():
            time.sleep(random.uniform(0.01, 0.05))  # other processes compete for the exclusive lock too


def _fill(copy: Path, fetch: Callable[[Path], object]) -> None:
    part = copy.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed process
    part.mkdir(mode=0o700)
    try:
        fetch(part)
        part.rename(copy)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _exclusive(file: int) -> bool:
    """Whether an exclusive lock was acquired. A shared lock is lost either way."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _is(file: int, lock: Path) -> bool:
    """Whether the open file is still the file at that path: the last process to use a copy deletes its lock as well."""
    try:
        return os.path.samestat(os.fstat(file), lock.lstat())
    except FileNotFoundError:
        return False


def _delete(copy: Path) -> None:
    """Delete a copy and its lock file; needs the exclusive lock. A partly deleted copy is never under the copy's
    name."""
    part = copy.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    if copy.exists():
        copy.rename(part)
        shutil.rmtree(part, ignore_errors=True)
    copy.with_suffix(".lock").unlink()


def sweep(root: Path, wanted: Path | None = None) -> None:
    """Delete the folders in `root` that no process uses, except the wanted one."""
    for lock in root.glob("*.lock"):
        with _mutex:
            if (copy := lock.with_suffix("")) != wanted and copy not in _lock_files:
                _delete_unused(copy, lock)


def _delete_unused(copy: Path, lock: Path) -> None:
    try:
        file = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if _exclusive(file) and _is(file, lock):
            _delete(copy)
    finally:
        os.close(file)


def _release(copy: Path) -> None:
    file = _lock_files.pop(copy)
    try:
        if _exclusive(file):
            _delete(copy)
    finally:
        os.close(file)


@functools.cache
def _at_exit() -> None:
    # Unlike atexit, this also runs at the end of a multiprocessing child.
    multiprocessing.util.Finalize(None, _release_all, exitpriority=0)


def _release_all() -> None:
    for copy in list(_lock_files):
        _release(copy)


def _forget() -> None:
    """A forked child shares its parent's locks: it closes its descriptors and deletes nothing."""
    global _mutex
    _mutex = threading.RLock()
    for file in _lock_files.values():
        os.close(file)
    _lock_files.clear()
    _at_exit.cache_clear()


os.register_at_fork(after_in_child=_forget)


def private(name: str, parent: str | None = None) -> Path:
    """The folder of that name of this user, in `parent` (by default TMPDIR); no other user can enter. Raises
    StorageError."""
    own = Path(parent or tempfile.gettempdir(), f"unlearn-{os.getuid()}")
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = own.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise StorageError(
            f"{own}: not a folder that this user alone may enter: remove it, or set TMPDIR to another place"
        )
    root = own / name
    root.mkdir(mode=0o700, exist_ok=True)
    return root
