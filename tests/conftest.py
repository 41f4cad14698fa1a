"""What the test files share: one thread, small images, a small model and run, and a real S3 server on loopback."""

import dataclasses
import gc
import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

# What the tests start computes on one thread too, and Ray's workers are not left waiting for the other processes of a
# parallel run: Ray gives them a niceness of 15, with which they come to nothing on a machine that is busy.
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}

import boto3
import botocore.session
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import settings
from support.images import CLASSES, tiny_table
from support.kubernetes_server import api_server  # noqa: F401
from support.methods import TOYS
from support.models import TINY
from support.runs import tiny_config
from support.s3 import ADMIN, BUCKET, READER, s3_identity, s3_serving
from support.s3_proxy import Proxy

from unlearn import config
from unlearn.data import pixels, s3_client, shards
from unlearn.models import weights
from unlearn.registry import METHODS

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("tests")


# Files in one process of a parallel run, since they share a set-up of the session that takes long: the API server.
TOGETHER = {
    name: "kubernetes"
    for name in (
        "test_submit_kubernetes", "test_submit_kubernetes_queue", "test_submit_kubernetes_refusals", "test_rayjob",
        "test_kubernetes", "test_cycle_pipeline",
    )
}  # fmt: skip
# The files that take longest, longest first; the others follow, those of FOLDERS, which wait for processes, before the
# rest.
LONGEST = [
    "test_sweep", "test_submit_ray", "test_demo", "test_stop", "test_plan", "test_ray", "test_lease", "test_strangers",
    "test_s3", "kubernetes", "test_families", "test_owner", "test_heartbeat", "test_resume", "test_shape",
    "test_evaluation", "test_engines", "test_submit_local", "test_cli", "test_local_ray",
]  # fmt: skip
FOLDERS = ["jobs", "training", "cycles", "cli"]


def _group(path: str | Path) -> str:
    return TOGETHER.get(Path(path).stem, Path(path).stem)


def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A parallel run hands out files, or several TOGETHER."""
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.partition("::")[0])

    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In an order by which the processes of a parallel run end at about one time."""

    def place(item: pytest.Item) -> tuple[int, int]:
        group, folder = _group(item.path), item.path.parent.name
        long = LONGEST.index(group) if group in LONGEST else len(LONGEST)
        return long, FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through it for garbage took a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """A run that is asked to stop (SIGTERM) stops as at Ctrl-C: what its fixtures have started ends with it."""
    tests = os.getpid()

    def stop(*_) -> None:
        if os.getpid() != tests:  # forked by a test, which ends it so
            os._exit(143)
        pytest.exit("terminated", 143)

    signal.signal(signal.SIGTERM, stop)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Torch on one thread: the same rounding everywhere, and no fight for cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_pixels(tmp_path_factory):
    """Decoded images are shared with no other test process, which would change what a cache holds."""
    pixels.MEMORY = str(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    """The methods of support.methods are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS, "entries", METHODS.entries | TOYS)
        yield


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> str:
    """A folder of 48 images in 3 shards of 2 row groups of 8 rows, with ids, subjects and 4 named classes. Read
    only."""
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


@pytest.fixture
def tiny_run(tiny_shards, tiny_model, tmp_path):
    """make("training.steps=3", ...) -> RunConfig, with a run folder of the test's own."""
    return lambda *overrides: tiny_config(tmp_path / "run", tiny_shards, tiny_model, *overrides)


@pytest.fixture
def told(capsys):
    """told(*arguments) -> (exit code, standard output, standard error with line ends folded)."""

    from unlearn.cli.app import main

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, " ".join(err.split())

    return call


@pytest.fixture
def logged(caplog):
    """caplog, which sees the project's log from `info` on, also after a command of this process has taken it away."""
    logger = logging.getLogger("unlearn")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = True
    yield caplog
    logger.setLevel(before[0])
    logger.propagate = before[1]


# The descriptions of S3 are read once, not once a client.
_LOADER = botocore.session.Session().get_component("data_loader")


@pytest.fixture(scope="session")
def s3_server():
    """The URL of a SeaweedFS server on loopback, with the bucket BUCKET, the users ADMIN and READER (of that bucket),
    and the bucket "public", which is read without keys."""
    everyone = {"name": "anonymous", "actions": ["Read:public", "List:public"]}
    with s3_serving([s3_identity(READER, actions=[f"Read:{BUCKET}", f"List:{BUCKET}"]), everyone], []) as url:
        yield url


@pytest.fixture
def s3_user(s3_server, monkeypatch):
    """login((key, secret), url=...): be that user of the S3 server, as the AWS variables say it."""

    def forget_clients():
        session = botocore.session.Session()
        session.register_component("data_loader", _LOADER)
        # Under the lock: a client that a thread of an earlier test is making just now would be kept after the clearing.
        with s3_client.making:
            boto3.setup_default_session(botocore_session=session)
            s3_client.client.cache_clear()

    def login(user: tuple[str, str], url: str = s3_server) -> None:
        values = {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": user[0], "AWS_SECRET_ACCESS_KEY": user[1],
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true", "UNLEARN_STORAGE_PATIENCE": "0", "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "UNLEARN_S3_HEDGE": "0",  # a busy machine stalls too, and requests are counted
        }  # fmt: skip
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
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
    for thread in threading.enumerate():  # reads that hang: their later requests would be counted in another test
        if thread.name == "s3-read":
            thread.join(30)


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


@pytest.fixture
def written(tiny_run, tmp_path):
    """written(*overrides) -> path of a YAML file that holds the small run; overrides may be wrong."""

    def write(*overrides: str) -> str:
        tree = config.override(tiny_run().model_dump(mode="json", exclude_defaults=True), list(overrides))
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return write
