"""Objects below one prefix of an S3 bucket: by boto3, and by pyarrow for random access to Parquet.

Endpoint, region and credentials come from the usual AWS variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, pod identity
...). Errors of the libraries are not caught here: `Storage` turns them into StorageError.
"""

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from unlearn.errors import StorageError

# Bytes of one part of a transfer; smaller files are transferred whole. S3 allows at most 10,000 parts, and 5 GB in a
# single PUT.
PART = 64 << 20


@dataclass(frozen=True)
class Facts:
    """Size and ETag of an object, as in a listing. etag: changes with its content."""

    size: int
    etag: str


class Bucket:
    """Names are relative to the prefix, with `/`; "" is the prefix itself."""

    def __init__(self, name: str, prefix: str):
        self.name, self.prefix = name, prefix

    def key(self, name: str) -> str:
        return "/".join(part for part in (self.prefix.rstrip("/"), name) if part)

    def head(self, name: str) -> Facts | None:
        """None where there is no such object; S3 gives the same answer for a bucket that does not exist."""
        if not self.key(name):
            return None
        try:
            response = client().head_object(Bucket=self.name, Key=self.key(name))
        except client().exceptions.ClientError as e:
            if e.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return None
            raise
        return Facts(response["ContentLength"], response["ETag"])

    def get(self, name: str) -> tuple[bytes, str]:
        """(content, ETag)."""
        response = client().get_object(Bucket=self.name, Key=self.key(name))
        return response["Body"].read(), response["ETag"]

    def put(self, name: str, data: bytes, **condition: str) -> bool:
        """Write a small object. condition: IfNoneMatch="*" or IfMatch=ETag; False where it is not met."""
        for attempt in range(10):
            try:
                client().put_object(Bucket=self.name, Key=self.key(name), Body=data, **condition)
                return True
            except client().exceptions.ClientError as e:
                code = e.response["Error"]["Code"]
                if code == "ConditionalRequestConflict":  # a concurrent write: S3 asks to retry
                    time.sleep(0.1 * attempt)
                elif code == "NoSuchKey":
                    return False
                elif code == "PreconditionFailed":
                    # The response to a first attempt may have been lost: then the object is the one written here.
                    return e.response["ResponseMetadata"].get("RetryAttempts", 0) > 0 and self.get(name)[0] == data
                else:
                    raise
        raise StorageError(f"s3://{self.name}/{self.key(name)}: too many writers at once")

    def upload(self, path: Path, name: str) -> None:
        """Send a file of any size, large ones by multipart; it is never read into memory as a whole."""
        client().upload_file(str(path), self.name, self.key(name), Config=_transfer())

    def download(self, name: str, path: Path) -> None:
        client().download_file(self.name, self.key(name), str(path), Config=_transfer())

    def open(self, name: str) -> pa.NativeFile:
        return arrow().open_input_file(f"{self.name}/{self.key(name)}")

    def listing(self, name: str) -> dict[str, Facts]:
        """Every object below `name`; without the empty objects with `/` at the end that some programs use to mark
        folders."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        below = (o for o in self._below(name) if not o["Key"].endswith("/"))
        return {o["Key"][cut:]: Facts(o["Size"], o["ETag"]) for o in below}

    def _below(self, name: str) -> Iterator[dict]:
        prefix = self.key(name)
        pages = (
            client().get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{prefix}/" if prefix else "")
        )
        for page in pages:
            yield from page.get("Contents", ())

    def delete(self, name: str) -> list[tuple[str, str]]:
        """Delete an object or all below `name`; (key, error code) of what S3 did not delete, for which boto3 raises
        nothing."""
        keys = [o["Key"] for o in self._below(name)] or [self.key(name)]
        refused = []
        for start in range(0, len(keys), 1000):
            objects = [{"Key": k} for k in keys[start : start + 1000]]
            response = client().delete_objects(Bucket=self.name, Delete={"Objects": objects, "Quiet": True})
            refused += [(e.get("Key", ""), e.get("Code", "")) for e in response.get("Errors", ())]
        return refused


def _transfer():
    from boto3.s3.transfer import TransferConfig

    # The queue holds data fetched and not yet written: 64 chunks of 256 KiB.
    return TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=8, max_io_queue=64)


@functools.cache
def client():
    import boto3
    from botocore.config import Config

    style = {"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {}
    return boto3.client(
        "s3", config=Config(retries={"mode": "standard", "max_attempts": 5}, s3=style, connect_timeout=10)
    )


@functools.cache
def arrow() -> pyarrow.fs.FileSystem:
    scheme, _, host = os.environ.get("AWS_ENDPOINT_URL", "").rpartition("://")
    place = {"endpoint_override": host, "scheme": scheme or "https"} if host else {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return pyarrow.fs.S3FileSystem(**place, **({"region": region} if region else {}))
