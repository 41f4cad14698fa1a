"""Objects below one prefix of an S3 bucket.

An outage of the server, or of the way to it, is waited out (see patience.py). Errors of the client are not caught here:
`Storage` turns them into StorageError.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from unlearn import patience
from unlearn.data import s3_client, s3_errors
from unlearn.data.facts import Facts
from unlearn.data.s3_object import Object
from unlearn.errors import ReplacedError, StorageError

T = TypeVar("T")

# Bytes of one part of a transfer; smaller files are transferred whole. S3 allows at most 10,000 parts, and 5 GB in a
# single PUT.
PART = 64 << 20
_known: set[str] = set()  # buckets that have been reached


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

        facts = self._outlast(name, ask)
        if facts is None and self.name not in _known:  # S3 answers for an object and a bucket alike
            try:
                self._outlast(name, lambda: self._below(name, 1))
            except self.client.exceptions.ClientError as e:
                if s3_errors.code(e) == "NoSuchBucket":
                    raise
        _known.add(self.name)
        return facts

    def get(self, name: str) -> tuple[bytes, str]:
        """(content, ETag)."""

        def ask() -> tuple[bytes, str]:
            response = self.client.get_object(Bucket=self.name, Key=self.key(name))
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

    def download(self, name: str, path: Path) -> None:
        self._outlast(name, lambda: self.client.download_file(self.name, self.key(name), str(path), Config=_transfer()))

    def open(self, name: str, facts: Facts, versions: dict[str, str] | None = None) -> pa.NativeFile:
        """For random access; all of it is of one version, that of `facts`, and of `versions` where it is in there."""
        if versions is not None and versions.setdefault(name, facts.etag) != facts.etag:
            raise StorageError(f"s3://{self.name}/{self.key(name)}: {s3_errors.hint('PreconditionFailed')}")

        def fetch(start: int, stop: int) -> bytes:
            response = self.client.get_object(
                Bucket=self.name, Key=self.key(name), Range=f"bytes={start}-{stop - 1}", IfMatch=facts.etag
            )
            data = response["Body"].read()
            if len(data) != stop - start or response["ETag"] != facts.etag:
                raise StorageError(
                    f"s3://{self.name}/{self.key(name)}: not the bytes that were asked for: it was replaced while it was read, or the "
                    "server does not know ranges"
                )
            return data

        def told(start: int, stop: int) -> bytes:
            try:
                return self._outlast(name, lambda: fetch(start, stop))
            except Exception as e:  # its reader is Arrow, which knows no error of S3
                if what := s3_errors.meaning(e):
                    error = ReplacedError if s3_errors.code(e) == "PreconditionFailed" else StorageError
                    raise error(f"s3://{self.name}/{self.key(name)}: {what}") from None
                raise

        return pa.PythonFile(Object(facts.size, told), mode="r")

    def listing(self, name: str) -> dict[str, Facts]:
        """Every object below `name`; without the empty objects with `/` at the end that some programs use to mark
        folders."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        below = (o for o in self._outlast(name, lambda: self._below(name)) if not o["Key"].endswith("/"))
        return {o["Key"][cut:]: Facts(o["Size"], o["ETag"]) for o in below}

    def delete(self, name: str) -> list[tuple[str, str]]:
        """Delete an object or all below `name`; (key, error code) of what S3 did not delete, for which boto3 raises
        nothing."""

        def ask(keys: list[str]) -> list[tuple[str, str]]:
            objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            response = self.client.delete_objects(Bucket=self.name, Delete=objects)
            return [(e.get("Key", ""), e.get("Code", "")) for e in response.get("Errors", ())]

        keys = [o["Key"] for o in self._outlast(name, lambda: self._below(name))] or [self.key(name)]
        refused = []
        for start in range(0, len(keys), 1000):
            refused += self._outlast(name, lambda part=keys[start : start + 1000]: ask(part))
        return refused

    def _below(self, name: str, most: int | None = None) -> list[dict]:
        prefix = self.key(name)
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.name, Prefix=f"{prefix}/" if prefix else "", PaginationConfig={"MaxItems": most}
        )
        return [o for page in pages for o in page.get("Contents", ())]

    def _outlast(self, name: str, call: Callable[[], T]) -> T:
        return patience.outlast(call, s3_errors.fault, f"s3://{self.name}/{self.key(name)}")


def _transfer():
    from boto3.s3.transfer import TransferConfig

    # The queue holds data fetched and not yet written: 64 chunks of 256 KiB.
    return TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=8, max_io_queue=64)
