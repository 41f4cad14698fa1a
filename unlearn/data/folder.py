"""Files below one folder, which may be shared by many machines (NFS). Writes are atomic."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from unlearn.data.facts import Facts
from unlearn.errors import StorageError

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Folder:
    """Names are relative to `root`, with `/`; "" is the root itself, which may be a file."""

    def __init__(self, root: str):
        self.root = root

    def path(self, name: str) -> Path:
        return Path(self.root, name)

    def read(self, name: str) -> tuple[bytes, str]:
        """(content, a version that changes with the content)."""
        data = self.path(name).read_bytes()
        return data, _version(data)

    def temporary(self, name: str) -> Path:
        """A hidden temporary path beside `name`, unique across processes and machines."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        own = f"{socket.gethostname()[:60]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        return target.with_name(f".{target.name[:100]}.{own}.part")

    def publish(self, temporary: Path, name: str) -> None:
        """Replace `name` by a complete file."""
        _sync(temporary)
        os.replace(temporary, self.path(name))

    def create(self, temporary: Path, name: str) -> bool:
        """Publish a complete file if `name` does not exist; False if it does. One of many concurrent callers
        succeeds."""
        target = self.path(name)
        _sync(temporary)
        try:
            os.link(temporary, target)  # fails where the target exists, over NFS too, where O_EXCL may not
        except FileExistsError:
            # NFS may lose the response and repeat the request: a link count of 2 means that this call made the file.
            return temporary.stat().st_nlink == 2
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            with _alone(target):
                if target.exists():
                    return False
                os.replace(temporary, target)
        return True

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Write `data` where `name` still has the content of that version; False where it has not."""
        target = self.path(name)
        if not target.parent.is_dir():
            return False
        with _alone(target):
            try:
                if self.read(name)[1] != version:
                    return False
            except FileNotFoundError:
                return False
            temporary = self.temporary(name)
            try:
                temporary.write_bytes(data)
                self.publish(temporary, name)
            finally:
                temporary.unlink(missing_ok=True)
            return True

    def facts(self, name: str) -> Facts:
        found = self.path(name).stat()
        return Facts(found.st_size, f"{found.st_mtime_ns}-{found.st_ino}")

    def open(self, name: str) -> pa.NativeFile:
        # Not mapped: where a mapped file is cut short meanwhile, the kernel ends the process (SIGBUS).
        return pa.OSFile(str(self.path(name)), "rb")

    def listing(self, name: str) -> list[str]:
        """Every file below `name`, without temporary files and locks."""
        paths = (p for p in self.path(name).rglob("*") if p.is_file())
        return [str(p.relative_to(self.root)) for p in paths if not _hidden(p.name)]

    def delete(self, name: str) -> None:
        if self.path(name).is_dir():
            shutil.rmtree(self.path(name))
        else:
            self.path(name).unlink(missing_ok=True)


def _hidden(name: str) -> bool:
    return name.startswith(".") and name.endswith((".part", ".lock"))


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Mutual exclusion by a file lock, which the kernel releases when the process ends; on NFS also between
    machines."""
    with open(target.with_name(f".{target.name}.lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            raise StorageError(
                f"{target.parent}: this file system has no file locks (flock): use another disk, or S3"
            ) from None
        yield
