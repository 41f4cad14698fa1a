"""A command that is asked to stop: the same in every phase and for both signals, one line, and no process left
behind."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from support.driver import Driver
from support.ray_nodes import TOKEN, Cluster, until
from support.runs import tiny_config

from unlearn import config, signals
from unlearn.training.checkpoint import Checkpoints

RAY = [
    "training.engine=deepspeed", "cluster.workers=2", "training.micro_batch_size=4", "training.steps=1000000",
    "training.checkpoint_every=20",
    "training.log_every=20", "training.schedule=constant", "method.name=pretrain",
]  # fmt: skip


@pytest.fixture
def written_to(tiny_shards, tiny_model, tmp_path):
    def write(*overrides: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(config.dump(tiny_config(tmp_path / "run", tiny_shards, tiny_model, *overrides)))
        return path

    return write


PHASES = {
    "imports": "start the same command again",
    "training": "--resume",
    "evaluating": "the model is there; go on with: unlearn evaluate",
}


@pytest.mark.parametrize(("phase", "sign"), [
    ("imports", signal.SIGTERM), ("training", signal.SIGINT), ("evaluating", signal.SIGTERM),
    pytest.param("imports", signal.SIGINT, marks=pytest.mark.slow),
    pytest.param("evaluating", signal.SIGINT, marks=pytest.mark.slow),
])  # fmt: skip
def test_every_phase(written_to, tmp_path, phase, sign):
    """SIGTERM while it trains: see the next test."""
    overrides = (
        ["training.steps=1000000", "training.checkpoint_every=5"]
        if phase == "training"
        else ["evaluation.limit=48", "evaluation.batch_size=1"]
    )
    driver = Driver(tmp_path, "run", written_to(*overrides))
    driver.until({
        "imports": lambda: "libtorch" in driver.maps(),
        "training": lambda: "checkpoint of step 5 committed" in driver.err,
        "evaluating": lambda: "measuring" in driver.err,
    }[phase])  # fmt: skip
    line = driver.stopped(sign)
    assert PHASES[phase] in line, line
    if phase == "training":
        step = Checkpoints(str(tmp_path / "run"), 2).steps()[-1]
        assert f"step {step} is saved; go on with: unlearn run {tmp_path}/run --resume" in line


def test_in_a_job_and_with_sigint_ignored(written_to, tmp_path):
    """A job is told how a job goes on, and hears SIGINT whatever it was started with; without a job SIGINT stays
    ignored. SIGUSR1 shows what a driver is doing, and it goes on."""
    path = written_to("training.steps=1000000", "training.checkpoint_every=5", "method.name=pretrain")
    driver = Driver(tmp_path, "pretrain", path, ignoring=True)
    driver.until(lambda: "step 5 committed" in driver.err)
    driver.process.send_signal(signal.SIGUSR1)
    driver.until(lambda: "most recent call first" in driver.err and "in train" in driver.err)
    driver.process.send_signal(signal.SIGINT)
    assert "--resume" in driver.stopped(signal.SIGTERM)
    driver = Driver(
        tmp_path, "pretrain", path, "--resume", ignoring=True, UNLEARN_JOB="half-1234", UNLEARN_LOG="info,json"
    )
    driver.until(lambda: "resumed from the checkpoint" in driver.err)
    line = driver.stopped(signal.SIGINT)
    assert (
        line.startswith('{"time"')
        and "go on with: unlearn jobs resume half-1234" in line
        and '"job": "half-1234"' in line
    )


def test_a_signal_that_comes_twice_is_one(monkeypatch):
    """As `timeout` sends it, to the process and to its group; later it is a second wish."""
    monkeypatch.setattr(signals, "_last", -math.inf)
    with pytest.raises(signals.Stopped):
        signals._raise(signal.SIGTERM, None)
    signals._raise(signal.SIGTERM, None)
    monkeypatch.setattr(signals, "_last", signals._last - 2 * signals.AGAIN)
    with pytest.raises(signals.Stopped):
        signals._raise(signal.SIGTERM, None)


@pytest.mark.slow
def test_sigterm_on_a_cluster_of_its_own(written_to, tmp_path):
    """As in tests/jobs/test_strangers.py, but the driver alone gets the signal."""
    driver = Driver(tmp_path, "pretrain", written_to(*RAY), RAY_ADDRESS="")
    checkpoints = Checkpoints(str(tmp_path / "run"), 2)
    driver.until(checkpoints.steps)
    left = psutil.Process(driver.process.pid).children(recursive=True)
    assert "is saved; go on with" in driver.stopped(signal.SIGTERM)
    assert not psutil.wait_procs(left, timeout=600)[1], "processes outlive the driver"


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder), alone=True)
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("sign", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_no_worker_is_left_on_a_cluster_that_lives_on(cluster, written_to, tmp_path, sign):
    address = f"127.0.0.1:{cluster.ports[0]}"
    driver = Driver(
        tmp_path, "pretrain", written_to(*RAY), RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN
    )
    driver.until(Checkpoints(str(tmp_path / "run"), 2).steps)
    assert workers(cluster)
    driver.stopped(sign)
    until(lambda: not workers(cluster))


FOLLOWER = """
import sys
from jobs import train
from jobs.cluster import connected
from unlearn import config

def fail(row):
    raise ValueError("the follower's own fault")

run = train.prepare(config.load(sys.argv[1]))
with connected(run.settings.cluster, 2):
    try:
        train.train(run, fail)
    except ValueError as error:
        print(error, flush=True)
    sys.stdin.read()  # it stays connected until the test has looked
"""


def test_a_follower_that_fails_stops_the_workers(cluster, written_to):
    """In a process that stays connected: nothing but the driver can have ended them."""
    env = os.environ | {
        "RAY_ADDRESS": f"127.0.0.1:{cluster.ports[0]}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    with subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, written_to(*RAY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "the follower's own fault\n"
        until(lambda: not workers(cluster))
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(600) == 0


def workers(cluster: Cluster) -> list[psutil.Process]:
    """The processes of Ray Train on the cluster: its workers and their controller."""
    found = []
    for process in cluster.processes("head"):
        with contextlib.suppress(psutil.Error):
            if any(kind in " ".join(process.cmdline()) for kind in ("RayTrainWorker", "TrainController")):
                found.append(process)
    return found
