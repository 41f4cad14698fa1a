"""Objects below one prefix of an S3 bucket: by boto3, and by pyarrow where Parquet is read at random places.

Endpoint, region and credentials come from the usual AWS variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, pod identity
...). What the libraries raise is passed on as it is: `Storage` tells it.
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

# Files are sent and fetched in parts of so many bytes, smaller ones whole. S3 takes 10,000 parts at most and a single PUT
# of 5 GB at most.
PART = 64 << 20


@dataclass(frozen=True)
class Facts:
    """What a listing says of an object. etag: changes with its content."""

    size: int
    etag: str


class Bucket:
    """Names are relative to the prefix, with `/`; "" is the prefix itself."""

    def __init__(self, name: str, prefix: str):
        self.name, self.prefix = name, prefix

    def key(self, name: str) -> str:
        return "/".join(part for part in (self.prefix.rstrip("/"), name) if part)

    def head(self, name: str) -> Facts | None:
        """None where there is no such object; a bucket that does not exist is told alike by S3."""
        if not self.key(name):
            return None
        try:
            answer = client().head_object(Bucket=self.name, Key=self.key(name))
        except client().exceptions.ClientError as e:
            if e.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return None
            raise
        return Facts(answer["ContentLength"], answer["ETag"])

    def get(self, name: str) -> tuple[bytes, str]:
        """(content, ETag)."""
        answer = client().get_object(Bucket=self.name, Key=self.key(name))
        return answer["Body"].read(), answer["ETag"]

    def put(self, name: str, data: bytes, **condition: str) -> bool:
        """Write a small object. condition: IfNoneMatch="*" or IfMatch=ETag; False where it is not met."""
        for attempt in range(10):
            try:
                client().put_object(Bucket=self.name, Key=self.key(name), Body=data, **condition)
                return True
            except client().exceptions.ClientError as e:
                code = e.response["Error"]["Code"]
                if code == "ConditionalRequestConflict":  # another writer is at work: S3 asks to try again
                    time.sleep(0.1 * attempt)
                elif code == "NoSuchKey":
                    return False
                elif code == "PreconditionFailed":
                    # The answer to a first attempt may have been lost: then it is our own write that stands there.
                    return e.response["ResponseMetadata"].get("RetryAttempts", 0) > 0 and self.get(name)[0] == data
                else:
                    raise
        raise StorageError(f"s3://{self.name}/{self.key(name)}: too many writers at once")

    def upload(self, path: Path, name: str) -> None:
        """Send a file of any size, large ones by multipart; never held in memory whole."""
        client().upload_file(str(path), self.name, self.key(name), Config=_transfer())

    def download(self, name: str, path: Path) -> None:
        client().download_file(self.name, self.key(name), str(path), Config=_transfer())

    def open(self, name: str) -> pa.NativeFile:
        return arrow().open_input_file(f"{self.name}/{self.key(name)}")

    def listing(self, name: str) -> dict[str, Facts]:
        """Every object below `name`; not the empty ones with `/` at the end, with which some programs mark a folder."""
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
        """Delete an object or all below `name`; (key, error code) of what S3 refuses, which is no exception there."""
        keys = [o["Key"] for o in self._below(name)] or [self.key(name)]
        refused = []
        for start in range(0, len(keys), 1000):
            objects = [{"Key": k} for k in keys[start : start + 1000]]
            answer = client().delete_objects(Bucket=self.name, Delete={"Objects": objects, "Quiet": True})
            refused += [(e.get("Key", ""), e.get("Code", "")) for e in answer.get("Errors", ())]
        return refused


def _transfer():
    from boto3.s3.transfer import TransferConfig

    # The queue holds what is fetched and not yet written: 64 pieces of 256 KiB.
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
