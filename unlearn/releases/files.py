"""Files of a release: copied, hashed and listed, here and on S3, never in memory as a whole."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from unlearn.data.storage import Storage, told

CHUNK = 8 << 20  # bytes


def copy(source: Storage, name: str, target: Storage, as_name: str) -> tuple[str, int]:
    """Copy one file; (sha256, bytes) of what was written. Raises StorageError."""
    digest, size = hashlib.sha256(), 0
    with _reading(source, name) as file, target.writing(as_name) as path, open(path, "wb") as out:
        while data := file.read(CHUNK):
            digest.update(data)
            size += out.write(data)
    return digest.hexdigest(), size


def digest(storage: Storage, name: str) -> str:
    """sha256 of one file. Raises StorageError."""
    digest = hashlib.sha256()
    with _reading(storage, name) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def listing(storage: Storage) -> dict[str, bool]:
    """{name: whether it is a plain file} of everything below a folder, hidden files, links and pipes too. Raises
    StorageError."""
    if not storage.is_local():
        return dict.fromkeys(storage.files(), True)
    found: dict[str, bool] = {}

    def refuse(error: OSError) -> None:
        raise error

    with told(storage.uri):
        for folder, folders, names in os.walk(storage.uri, onerror=refuse):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in [*names, *links]:
                path = Path(folder, name)
                found[path.relative_to(storage.uri).as_posix()] = stat.S_ISREG(path.lstat().st_mode)
    return found


@contextlib.contextmanager
def _reading(storage: Storage, name: str) -> Iterator[IO[bytes] | Any]:
    # A local file is not mapped: one that is cut short meanwhile would end the process.
    with told(storage.where(name)):
        file = open(storage.folder.path(name), "rb") if storage.is_local() else storage.open(name)
        with file:
            yield file
