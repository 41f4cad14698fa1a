"""One way to reach local folders and S3: `Storage("path" | "file://..." | "s3://bucket/prefix" | "embedded:NAME")`.

S3 takes its endpoint, region and credentials from the usual AWS variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, pod
identity ...), never from a config of ours. What is written appears whole or not at all.
"""

import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from unlearn.errors import StorageError

_HINTS = {
    "InvalidAccessKeyId": "the access key is not known there: check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret does not fit the access key: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired: renew it",
    "AccessDenied": "these credentials may not do this: check the bucket's policy",
    "403": "these credentials are wrong or may not do this: check them and the bucket's policy",
    "NoSuchBucket": "there is no such bucket: check the name, the region and AWS_ENDPOINT_URL",
    "NoSuchKey": "there is no such object",
    "404": "there is no such object or bucket",
}


class Storage:
    """A folder (or one file) by URI. Names below it are relative, with `/`; "" is the root itself.

    Raises StorageError for everything that goes wrong at the other end.
    """

    def __init__(self, uri: str | Path):
        uri = str(uri)
        if uri.startswith("embedded:"):
            root = files("unlearn") / "embedded" / uri.removeprefix("embedded:")
            if not root.exists():
                raise StorageError(f"{uri}: the package carries nothing of that name")
            uri = str(root)
        self._bucket, self._root = None, uri
        if uri.startswith("s3://"):
            self._bucket, _, self._root = uri.removeprefix("s3://").rstrip("/").partition("/")
            if not self._bucket:
                raise StorageError(f"{uri}: name the bucket, as in s3://bucket/prefix")
            self.uri = f"s3://{self._bucket}/{self._root}".rstrip("/")
        elif "://" in uri and not uri.startswith("file://"):
            raise StorageError(f"{uri}: only paths, file:// and s3:// are understood")
        else:
            self._root = self.uri = os.path.abspath(uri.removeprefix("file://"))

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self._root.rstrip("/"), name) if part)

    def where(self, name: str) -> str:
        """The full URI of a name, for messages."""
        return f"{self.uri}/{name}" if name else self.uri

    def is_local(self) -> bool:
        return self._bucket is None

    def is_file(self, name: str = "") -> bool:
        """Whether a file or an object stands there."""
        if self.is_local():
            return os.path.isfile(self._key(name))
        if not self._key(name):
            return False
        with _told(self.where(name)):
            try:
                _client().head_object(Bucket=self._bucket, Key=self._key(name))
                return True
            except _client().exceptions.ClientError as e:
                if e.response["Error"]["Code"] in ("404", "NoSuchKey"):
                    return False
                raise

    def read(self, name: str = "") -> bytes:
        with _told(self.where(name)):
            if self.is_local():
                return Path(self._key(name)).read_bytes()
            return _client().get_object(Bucket=self._bucket, Key=self._key(name))["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        """Publish `data` under `name`, whole or not at all."""
        with _told(self.where(name)):
            if self.is_local():
                with _published(self._key(name)) as temporary:
                    temporary.write_bytes(data)
            else:
                _client().put_object(Bucket=self._bucket, Key=self._key(name), Body=data)

    def upload(self, path: Path, name: str) -> None:
        """Publish a local file under `name`, whole or not at all; the local file is gone after."""
        with _told(self.where(name)):
            if self.is_local():
                with _published(self._key(name)) as temporary:
                    shutil.move(path, temporary)
            else:
                _client().upload_file(str(path), self._bucket, self._key(name))
                path.unlink()

    def open(self, name: str = "") -> pa.NativeFile:
        """A file to read at random places, as Parquet readers want it."""
        with _told(self.where(name)):
            if self.is_local():
                return pa.memory_map(self._key(name))
            return _arrow_s3().open_input_file(f"{self._bucket}/{self._key(name)}")

    def files(self, name: str = "") -> list[str]:
        """Names of all files below `name`, relative to the root, sorted."""
        with _told(self.where(name)):
            if self.is_local():
                root = Path(self._root)
                return sorted(str(p.relative_to(root)) for p in Path(self._key(name)).rglob("*") if p.is_file())
            prefix = self._key(name)
            pages = _client().get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{prefix}/" if prefix else ""
            )
            cut = len(self._root) + 1 if self._root else 0
            return sorted(o["Key"][cut:] for page in pages for o in page.get("Contents", ()))

    def delete(self, name: str) -> None:
        """Delete a file or everything below a folder; nothing there is no error."""
        with _told(self.where(name)):
            if not self.is_local():
                keys = [self._key(n) for n in (self.files(name) or [name])]
                for start in range(0, len(keys), 1000):
                    objects = [{"Key": k} for k in keys[start : start + 1000]]
                    answer = _client().delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
                    for error in answer.get("Errors", ()):  # a refusal is no exception here
                        code = error.get("Code", "")
                        raise StorageError(f"s3://{self._bucket}/{error.get('Key')}: not deleted: {_HINTS.get(code) or code}")
            elif os.path.isdir(self._key(name)):
                shutil.rmtree(self._key(name))
            else:
                Path(self._key(name)).unlink(missing_ok=True)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A path at which the file can be read: its own, or that of a temporary copy."""
    storage = Storage(uri)
    if storage.is_local():
        if not storage.is_file():
            raise StorageError(f"{uri}: there is no such file")
        yield Path(storage.uri)
        return
    with tempfile.TemporaryDirectory() as folder, _told(uri):
        path = Path(folder) / storage.uri.rpartition("/")[2]
        _client().download_file(storage._bucket, storage._root, str(path))
        yield path


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A path at which a file or a whole folder can be read: its own, or that of a temporary copy."""
    storage = Storage(uri)
    if storage.is_local():
        if not os.path.exists(storage.uri):
            raise StorageError(f"{uri}: there is no such file or folder")
        yield Path(storage.uri)
    elif storage.is_file():
        with local_copy(uri) as path:
            yield path
    else:
        names = storage.files()
        if not names:
            raise StorageError(f"{uri}: there is no such file or folder")
        with tempfile.TemporaryDirectory() as folder, _told(uri):
            for name in names:
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _client().download_file(storage._bucket, storage._key(name), str(path))
            yield Path(folder)


@contextlib.contextmanager
def _published(path: str) -> Iterator[Path]:
    """A temporary neighbour that takes the place of `path` once it is whole and on the disk."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Turn what the file system and S3 raise into one StorageError. No message carries a credential."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError(f"{where}: there is no such file or folder") from None
    except OSError as e:
        text = " ".join(str(e).split())
        hint = next((hint for code, hint in _HINTS.items() if len(code) > 3 and code.lower() in text.lower().replace("_", "")), None)
        raise StorageError(f"{where}: {hint or e.strerror or text[:200]}") from None
    except Exception as e:
        # botocore is imported by the S3 calls alone, so its errors are told by their module and their answer.
        if not type(e).__module__.startswith(("botocore", "boto3")):
            raise
        # A failed upload carries the answer in its text alone.
        code = getattr(e, "response", {}).get("Error", {}).get("Code") or (re.findall(r"\((\w+)\) when calling", str(e)) or [""])[0]
        missing = {"NoCredentialsError": "no S3 credentials found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                   "EndpointConnectionError": "no S3 server answers: check AWS_ENDPOINT_URL and the network"}
        raise StorageError(f"{where}: {_HINTS.get(code) or missing.get(type(e).__name__) or str(e)[:200]}") from None


@functools.cache
def _client():
    import boto3
    from botocore.config import Config

    style = {"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {}
    return boto3.client("s3", config=Config(retries={"mode": "standard", "max_attempts": 5}, s3=style, connect_timeout=10))


@functools.cache
def _arrow_s3() -> pyarrow.fs.FileSystem:
    scheme, _, host = os.environ.get("AWS_ENDPOINT_URL", "").rpartition("://")
    place = {"endpoint_override": host, "scheme": scheme or "https"} if host else {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return pyarrow.fs.S3FileSystem(**place, **({"region": region} if region else {}))
