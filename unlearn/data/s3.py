"""Objects below one prefix of an S3 bucket.

An outage of the server, or of the way to it, is waited out (see patience.py), and a read that hangs is made again (see
hedge.py). Errors of the client are not caught here: `Storage` turns them into StorageError.
"""

import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from unlearn import patience
from unlearn.data import s3_client, s3_errors
from unlearn.data.facts import Facts
from unlearn.data.hedge import Hedge
from unlearn.data.s3_object import THREADS, Object
from unlearn.errors import ReplacedError, StorageError

T = TypeVar("T")

# Bytes of one part of a transfer; smaller files are transferred whole. S3 allows at most 10,000 parts, and 5 GB in a
# single PUT.
PART = 64 << 20
SLOW = 1 << 20  # bytes a second that no read is thought to hang for
CHUNK = 1 << 20  # bytes of a download in memory, of each part
_known: set[str] = set()  # buckets that have been reached
_hedge = Hedge()


class Bucket:
    """Names are relative to the prefix, with `/`; "" is the prefix itself."""

    def __init__(self, name: str, prefix: str):
        self.name, self.prefix = name, prefix

    @property
    def client(self):
        return s3_client.of(self.name)

    def key(self, name: str) -> str:
        return "/".join(part for part in (self.prefix.rstrip("/"), name) if part)

    def head(self, name: str) -> Facts | None:
        """None where there is no such object. Raises where there is no such bucket."""
        if not self.key(name):
            return None

        def ask() -> Facts | None:
            try:
                response = self.client.head_object(Bucket=self.name, Key=self.key(name))
            except self.client.exceptions.ClientError as e:
                if s3_errors.code(e) in ("404", "NoSuchKey"):
                    return None
                raise
            return Facts(response["ContentLength"], response["ETag"])

        facts = self._read(name, ask)
        if facts is None and self.name not in _known:  # S3 answers for an object and a bucket alike
            try:
                self._below(name, 1)
            except self.client.exceptions.ClientError as e:
                if s3_errors.code(e) == "NoSuchBucket":
                    raise
        _known.add(self.name)
        return facts

    def get(self, name: str) -> tuple[bytes, str]:
        """(content, ETag)."""

        def ask() -> tuple[bytes, str]:
            # A large body takes long on a slow link: what hangs is its beginning.
            response = _hedge.first(
                lambda: self.client.get_object(Bucket=self.name, Key=self.key(name)), s3_client.hedge()
            )
            return response["Body"].read(), response["ETag"]

        return self._outlast(name, ask)

    def put(self, name: str, data: bytes, **condition: str) -> bool:
        """Write a small object. condition: IfNoneMatch="*" or IfMatch=ETag; False where it is not met."""
        sent = False  # whether an earlier attempt may have been carried out

        def ask() -> bool:
            nonlocal sent
            before, sent = sent, True
            try:
                self.client.put_object(Bucket=self.name, Key=self.key(name), Body=data, **condition)
                return True
            except self.client.exceptions.ClientError as e:
                code = s3_errors.code(e)
                if code == "NoSuchKey" and condition:
                    return False
                if code == "PreconditionFailed":
                    # The response to an earlier attempt may have been lost: then the object is the one written here.
                    repeated = before or e.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    return repeated and self.get(name)[0] == data
                raise

        for attempt in range(10):
            try:
                return self._outlast(name, ask)
            except self.client.exceptions.ClientError as e:
                if s3_errors.code(e) != "ConditionalRequestConflict":  # a concurrent write: S3 asks to retry
                    raise
            time.sleep(0.1 * attempt)
        raise StorageError(f"s3://{self.name}/{self.key(name)}: too many writers at once")

    def upload(self, path: Path, name: str) -> None:
        """Send a file of any size, large ones by multipart; it is never read into memory as a whole."""
        self._outlast(name, lambda: self.client.upload_file(str(path), self.name, self.key(name), Config=_transfer()))

    def download(self, name: str, path: Path, facts: Facts | None = None) -> None:
        """Fetch an object of any size into a file, several pieces at a time; all are of one version.

        facts: what is known of it; else its first piece tells. Raises FileNotFoundError, ReplacedError, StorageError.
        """

        def piece(start: int, ask: Callable[[], tuple[Facts, Any]]) -> Facts:
            """Stream one range to its place; what hangs is its beginning, or its connection is given up."""
            at, (told, body) = start, _hedge.first(ask, s3_client.hedge())
            for chunk in body.iter_chunks(CHUNK):
                at += os.pwrite(file.fileno(), chunk, at)
            return told

        with open(path, "wb") as file, ThreadPoolExecutor(THREADS) as pool:
            whole, first = facts, 0
            if whole is None:
                begin = functools.partial(self._part, name, f"0-{PART - 1}", PART)
                try:
                    whole, first = self._outlast(name, lambda: piece(0, begin)), PART
                except self.client.exceptions.ClientError as e:
                    whole = self._empty(name, e)
            file.truncate(whole.size)

            def rest(start: int) -> Facts:
                stop = min(whole.size, start + PART)
                return self._outlast(name, lambda: piece(start, lambda: (whole, self._range(name, whole, start, stop))))

            for _ in pool.map(rest, range(first, whole.size, PART)):
                pass

    def end(self, name: str, most: int) -> tuple[Facts, bytes]:
        """(size and version of an object, its last `most` bytes or all of fewer), by one request. Raises
        FileNotFoundError."""

        def ask() -> tuple[Facts, bytes]:
            facts, body = self._part(name, f"-{most}", most)
            return facts, body.read()

        try:
            return self._read(name, ask, most)
        except self.client.exceptions.ClientError as e:
            return self._empty(name, e), b""

    def _part(self, name: str, span: str, most: int) -> tuple[Facts, Any]:
        """(size and version of an object, the stream of the first or the last `most` bytes of it, or of all of
        fewer)."""
        response = self.client.get_object(Bucket=self.name, Key=self.key(name), Range=f"bytes={span}")
        length = response["ContentLength"]
        size = response.get("ContentRange", "").rpartition("/")[2] or ("" if length else "0")
        if not size.isdecimal() or length != min(int(size), most):
            raise StorageError(f"s3://{self.name}/{self.key(name)}: the server does not know ranges")
        return Facts(int(size), response["ETag"]), response["Body"]

    def _empty(self, name: str, error: Exception) -> Facts:
        """What is known of an object of no bytes, for a range of which S3 answers `error`. Raises FileNotFoundError
        where there is no such object, and every other error."""
        if s3_errors.code(error) in ("404", "NoSuchKey"):
            raise FileNotFoundError(name) from None
        if s3_errors.code(error) not in ("416", "InvalidRange"):
            raise error
        if (facts := self.head(name)) is None:
            raise FileNotFoundError(name)
        return facts

    def open(self, name: str, facts: Facts, versions: dict[str, str] | None = None, end: bytes = b"") -> pa.NativeFile:
        """For random access; all of it is of one version, that of `facts`, and of `versions` where it is in there.
        end: its last bytes, where they are known."""
        if versions is not None and versions.setdefault(name, facts.etag) != facts.etag:
            raise StorageError(f"s3://{self.name}/{self.key(name)}: {s3_errors.hint('PreconditionFailed')}")
        return pa.PythonFile(Object(facts.size, self._ranges(name, facts), end), mode="r")

    def _ranges(self, name: str, facts: Facts) -> Callable[[int, int], bytes]:
        """fetch(start, stop) -> those bytes of this version of an object. It raises StorageError for every error."""

        def told(start: int, stop: int) -> bytes:
            try:
                return self._read(name, lambda: self._range(name, facts, start, stop).read(), stop - start)
            except Exception as e:  # its reader may be Arrow, which knows no error of S3
                if what := s3_errors.meaning(e):
                    error = ReplacedError if s3_errors.code(e) == "PreconditionFailed" else StorageError
                    raise error(f"s3://{self.name}/{self.key(name)}: {what}") from None
                raise

        return told

    def _range(self, name: str, facts: Facts, start: int, stop: int) -> Any:
        """The stream of these bytes of this version of an object, which raises where it ends too soon."""
        response = self.client.get_object(
            Bucket=self.name, Key=self.key(name), Range=f"bytes={start}-{stop - 1}", IfMatch=facts.etag
        )
        if response["ContentLength"] != stop - start or response["ETag"] != facts.etag:
            raise StorageError(
                f"s3://{self.name}/{self.key(name)}: not the bytes that were asked for: it was replaced while it was "
                "read, or the server does not know ranges"
            )
        return response["Body"]

    def listing(self, name: str) -> dict[str, Facts]:
        """Every object below `name`; without the empty objects with `/` at the end that some programs use to mark
        folders."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        below = (o for o in self._below(name) if not o["Key"].endswith("/"))
        return {o["Key"][cut:]: Facts(o["Size"], o["ETag"]) for o in below}

    def delete(self, name: str) -> list[tuple[str, str]]:
        """Delete an object or all below `name`; (key, error code) of what S3 did not delete, for which boto3 raises
        nothing."""

        def ask(keys: list[str]) -> list[tuple[str, str]]:
            objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            response = self.client.delete_objects(Bucket=self.name, Delete=objects)
            return [(e.get("Key", ""), e.get("Code", "")) for e in response.get("Errors", ())]

        keys = [o["Key"] for o in self._below(name)] or [self.key(name)]
        refused = []
        for start in range(0, len(keys), 1000):
            refused += self._outlast(name, lambda part=keys[start : start + 1000]: ask(part))
        return refused

    def _below(self, name: str, most: int = 1000) -> list[dict]:
        """What the server tells of every object below `name`; most: objects of one answer. With 1: of the first one."""
        prefix, found, after = self.key(name), [], {}
        while True:
            page = self._read(
                name,
                lambda after=after: self.client.list_objects_v2(
                    Bucket=self.name, Prefix=f"{prefix}/" if prefix else "", MaxKeys=most, **after
                ),
            )
            found += page.get("Contents", ())
            if not page.get("IsTruncated") or most == 1:
                return found
            after = {"ContinuationToken": page["NextContinuationToken"]}

    def _read(self, name: str, call: Callable[[], T], size: int = 0) -> T:
        """As `_outlast`, of what may be asked for several times at once; size: bytes of the answer."""
        least = s3_client.hedge()
        return self._outlast(name, lambda: _hedge.first(call, least and least + size / SLOW))

    def _outlast(self, name: str, call: Callable[[], T]) -> T:
        def ask() -> T:
            used = self.client
            try:
                return call()
            except Exception as e:
                if s3_errors.code(e) in s3_errors.KEYS and s3_client.renewed(self.name, used):
                    return call()
                raise

        return patience.outlast(ask, s3_errors.fault, f"s3://{self.name}/{self.key(name)}")


def _transfer():
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=THREADS)
