"""One interface to local folders and S3: `Storage("path" | "file://..." | "s3://bucket/prefix" | "embedded:NAME")`.

S3 takes its endpoint, region and credentials from the usual AWS variables and files (see s3_client.py), never from this
program's configuration, and its outages are waited out. Writes are atomic.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

import pyarrow as pa

from unlearn.data import s3_errors
from unlearn.data.facts import Facts
from unlearn.data.folder import Folder
from unlearn.data.s3 import Bucket
from unlearn.errors import StorageError


class Storage:
    """A folder (or one file) by URI. Names below it are relative, with `/`; "" is the root itself.

    Raises StorageError for every error of the file system or the S3 server.
    """

    def __init__(self, uri: str | Path):
        uri = str(uri)
        if uri.startswith("embedded:"):
            root = files("unlearn") / "embedded" / uri.removeprefix("embedded:")
            if not (root.is_file() or root.is_dir()):
                raise StorageError(f"{uri}: the package carries nothing of that name")
            uri = str(root)
        self.bucket: Bucket | None = None
        if uri.startswith("s3://"):
            bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
            if not bucket:
                raise StorageError(f"{uri}: name the bucket, as in s3://bucket/prefix")
            self.bucket, self.uri = Bucket(bucket, prefix), f"s3://{bucket}/{prefix}".rstrip("/")
        elif "://" in uri and not uri.startswith("file://"):
            raise StorageError(f"{uri}: only paths, file:// and s3:// are understood")
        else:
            self.uri = os.path.abspath(uri.removeprefix("file://"))
            if any("\ud800" <= letter <= "\udfff" for letter in self.uri):
                raise StorageError(f"{self.uri}: this path is not UTF-8: rename the folder")
            self.folder = Folder(self.uri)

    def where(self, name: str) -> str:
        """The full URI of a name, for messages."""
        return f"{self.uri}/{name}" if name else self.uri

    def is_local(self) -> bool:
        return self.bucket is None

    def check_writable(self) -> None:
        """Raise StorageError where nothing could be written to this folder of a disk. Of S3 only a write can tell."""
        if self.bucket is None:
            there = Path(self.uri)
            while not os.path.lexists(there):
                there = there.parent
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                what = "a file" if there.is_file() else "not this user's to write to"
                raise StorageError(f"{self.uri} cannot be written: {there} is {what}")

    def is_file(self, name: str = "") -> bool:
        """Whether a file or an object of that name exists."""
        with told(self.where(name)):
            return self.folder.path(name).is_file() if self.bucket is None else self.bucket.head(name) is not None

    def read(self, name: str = "") -> bytes:
        with told(self.where(name)):
            return self.folder.path(name).read_bytes() if self.bucket is None else self.bucket.get(name)[0]

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        """(content, its version as `replace` takes it), or None where there is no such file."""
        with told(self.where(name)):
            try:
                return self.folder.read(name) if self.bucket is None else self.bucket.get(name)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except Exception as e:
                if s3_errors.code(e) == "NoSuchKey":
                    return None
                raise

    def write(self, name: str, data: bytes, private: bool = False) -> None:
        """Publish `data` under `name`, atomically. For large data use `writing` or `upload`.

        private: a local file is readable by its owner only; access to S3 objects is set by the bucket's policy.
        """
        with told(self.where(name)):
            if self.bucket is not None:
                self.bucket.put(name, data)
                return
            with self.writing(name) as path:
                path.touch(0o600 if private else 0o666)
                path.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` if the name does not exist; False if it does. Exactly one of many concurrent callers
        succeeds."""
        with told(self.where(name)):
            if self.bucket is not None:
                return self.bucket.put(name, data, IfNoneMatch="*")
            temporary = self.folder.temporary(name)
            try:
                temporary.write_bytes(data)
                return self.folder.create(temporary, name)
            finally:
                temporary.unlink(missing_ok=True)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Publish `data` if `name` still has the version from `read_version`; False if it has changed or is gone."""
        with told(self.where(name)):
            if self.bucket is not None:
                return self.bucket.put(name, data, IfMatch=version)
            return self.folder.replace(name, data, version)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write to; the file there at the end of the block, of any size, is published under `name`."""
        if self.bucket is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "part")
                yield path
                with told(self.where(name)):
                    self.bucket.upload(path, name)
            return
        with told(self.where(name)):
            temporary = self.folder.temporary(name)
        try:
            yield temporary
            with told(self.where(name)):
                self.folder.publish(temporary, name)
        finally:
            with contextlib.suppress(OSError):  # on a disk that cannot be written there is none to remove
                temporary.unlink()

    def upload(self, path: Path, name: str) -> None:
        """Publish a local file of any size under `name`, atomically; the local file is removed."""
        with told(self.where(name)):
            if self.bucket is not None:
                self.bucket.upload(path, name)
                path.unlink()
                return
            with self.writing(name) as temporary:
                shutil.move(path, temporary)

    def facts(self, name: str = "") -> Facts:
        """Size and version of a file."""
        with told(self.where(name)):
            if self.bucket is None:
                return self.folder.facts(name)
            if facts := self.bucket.head(name):
                return facts
            raise FileNotFoundError(name)

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Bytes of each of these files; many S3 objects are asked for at once. Raises StorageError where one is not
        there."""
        if self.bucket is None or len(names) < 3:
            return {name: self.facts(name).size for name in names}
        with told(self.uri):
            there = self.bucket.listing("")
        for name in names:
            if name not in there:
                raise StorageError(f"{self.where(name)}: there is no such file or folder")
        return {name: there[name].size for name in names}

    def open(self, name: str = "", versions: dict[str, str] | None = None, facts: Facts | None = None) -> pa.NativeFile:
        """A file for random access, as Parquet readers need it. An S3 object that is replaced while it is open cannot
        be read on.

        versions: {name: version} of S3 objects that were opened before, which this one is added to, and must still be.
        facts: what is known of an S3 object, which is then not asked for, and must still be so.
        """
        with told(self.where(name)):
            if self.bucket is None:
                return self.folder.open(name)
            return self.bucket.open(name, facts or self.facts(name), versions)

    def open_from_end(
        self, name: str, most: int, versions: dict[str, str] | None = None
    ) -> tuple[Facts, pa.NativeFile]:
        """(size and version of a file, the file as from `open`), for a reader that begins with the last `most` bytes:
        of an S3 object one request tells all of it."""
        with told(self.where(name)):
            if self.bucket is None:
                return self.folder.facts(name), self.folder.open(name)
            facts, end = self.bucket.end(name, most)
            return facts, self.bucket.open(name, facts, versions, end)

    def files(self, name: str = "") -> list[str]:
        """Names of all files below `name`, relative to the root, sorted."""
        with told(self.where(name)):
            return sorted((self.folder if self.bucket is None else self.bucket).listing(name))

    def objects(self) -> dict[str, Facts]:
        """Size and ETag of the S3 object at this URI, whose name is "", or of all objects below it.

        Raises StorageError where there is none.
        """
        assert self.bucket is not None, "only S3 has objects"
        with told(self.uri):
            one = self.bucket.head("")
            facts = {"": one} if one else self.bucket.listing("")
        if not facts:
            raise StorageError(f"{self.uri}: there is no such file or folder")
        return facts

    def delete(self, name: str) -> None:
        """Delete a file or everything below a folder; no error if it does not exist."""
        with told(self.where(name)):
            if self.bucket is None:
                self.folder.delete(name)
                return
            for key, code in self.bucket.delete(name):
                raise StorageError(f"s3://{self.bucket.name}/{key}: not deleted: {s3_errors.hint(code)}")


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A path at which the file can be read: its own, or that of a temporary copy."""
    storage = Storage(uri)
    if storage.is_local():
        if not storage.is_file():
            raise StorageError(f"{uri}: there is no such file")
        yield Path(storage.uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield download(storage, {"": None}, Path(folder))


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A path at which a file or a whole folder can be read: its own, or that of a temporary copy."""
    storage = Storage(uri)
    if storage.is_local():
        if not os.path.exists(storage.uri):
            raise StorageError(f"{uri}: there is no such file or folder")
        yield Path(storage.uri)
        return
    names = storage.objects()
    with tempfile.TemporaryDirectory() as folder:
        yield download(storage, names, Path(folder))


def download(storage: Storage, names: Mapping[str, Facts | None], folder: Path) -> Path:
    """Fetch S3 objects to `folder`/LAST PART OF THE URI, and below it; that path. names: with what is known of each."""
    bucket = storage.bucket
    assert bucket is not None, "only S3 has objects"
    root = folder / (bucket.key("").rpartition("/")[2] or bucket.name)
    for name, facts in names.items():
        path = Path(os.path.normpath(root / name))
        if not path.is_relative_to(root):  # S3 allows any name, also with `..`
            raise StorageError(f"{storage.where(name)}: a name that leads out of its folder")
        with told(storage.where(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            bucket.download(name, path, facts)
    return root


@contextlib.contextmanager
def told(where: str) -> Iterator[None]:
    """Turn errors of the file system and S3 into one StorageError. No message contains a credential."""
    try:
        yield
    except Exception as e:
        if what := s3_errors.meaning(e):
            raise StorageError(f"{where}: {what}") from None
        if isinstance(e, FileNotFoundError):
            raise StorageError(f"{where}: there is no such file or folder") from None
        if isinstance(e, OSError):
            raise StorageError(f"{where}: {e.strerror or ' '.join(str(e).split())[:200]}") from None
        raise
