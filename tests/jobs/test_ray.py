"""Runs on a real Ray cluster of this machine: the same losses, killed workers, killed drivers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
import ray.train
import yaml
from support.ray_nodes import until
from support.runs import tiny_config, train
from support.workers import together

from jobs import own_cluster
from jobs.cluster import connected
from jobs.pool import pool
from jobs.trainer import StoppableTrainer
from unlearn import config
from unlearn.errors import ClusterError, TrainingError, WorkerDied
from unlearn.training import metrics
from unlearn.training.checkpoint import Checkpoints

# Long enough to be killed in, with a checkpoint to go back to before and after.
LONG = [
    "training.engine=deepspeed", "cluster.workers=2", "training.micro_batch_size=4", "training.steps=240",
    "training.checkpoint_every=20", "training.log_every=20", "method.name=pretrain",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards, tiny_model, tmp_path_factory):
    """The long run, trained without Ray and without a stop."""
    run = tiny_config(tmp_path_factory.mktemp("long") / "run", tiny_shards, tiny_model, *LONG)
    together([run], 2)
    return run


def last_weights(run: config.RunConfig) -> list[bytes]:
    """Every rank's file of the newest checkpoint: weights and optimizer state, to the bit."""
    folder = Path(run.run_dir, "checkpoints", f"step-{run.training.steps:08d}")
    return [p.read_bytes() for p in sorted(folder.glob("*.safetensors"))]


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine for several runs, which else have one each: that takes longer than the runs."""
    with connected(config.Cluster(), 1):
        yield


def ray_workers() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if p.is_running() and "RayTrainWorker" in " ".join(p.cmdline() or [p.name()])]


def test_a_cluster_that_is_too_small_or_not_there(tiny_run):
    """The first of the file: the others share a cluster, which a run takes where there is one."""
    with connected(tiny_run().cluster, 1):
        assert ray.is_initialized()
        with pytest.raises(ClusterError, match="999 CPUs are asked for, the cluster has"):
            with connected(config.Cluster(workers=999), 999):
                pass
    assert not ray.is_initialized()
    with pytest.raises(ClusterError, match="no Ray cluster answers at 127.0.0.1:1"):
        with connected(config.Cluster(address="127.0.0.1:1"), 1):
            pass


def test_a_killed_worker_changes_nothing(cluster, uninterrupted, tmp_path):
    """Weights, optimizer state and losses are those of the run without Ray; all rows are told, and nothing is
    pickled."""
    run = uninterrupted.model_copy(update={"run_dir": str(tmp_path / "run")})
    killed, seen = [], []

    def kill(row: dict) -> None:
        seen.append(row["step"])
        if not killed and row["step"] < run.training.steps - 20:
            victim = until(ray_workers)[-1]
            killed.append(victim.pid)
            victim.kill()

    model = train(run, progress=kill)
    assert killed, f"the run was over too soon: {seen}"
    assert last_weights(run) == last_weights(uninterrupted)
    rows, expected = metrics.read(run.run_dir), metrics.read(uninterrupted.run_dir)
    assert [(r["step"], r["loss"]) for r in rows] == [(r["step"], r["loss"]) for r in expected]
    assert {"images_per_s", "grad_norm", "lr", "peak_memory_gib"} <= set(rows[0])
    assert Path(model, "weights.safetensors").exists() and not list(Path(run.run_dir).rglob("*.p*kl*"))


def test_a_piece_that_kills_its_workers_is_told_and_they_are_started_again(cluster):
    def task():
        return lambda piece: os._exit(1) if piece == "kill" else piece

    with pool(task, cluster=config.Cluster(cpus_per_worker=0.5), workers=2, here=False) as mapped:
        assert list(mapped(range(5))) == [0, 1, 2, 3, 4]
        with pytest.raises(WorkerDied, match="died more than 3 times: .*; it may need more memory"):
            list(mapped(["kill"]))
        assert list(mapped(range(5))) == [0, 1, 2, 3, 4]


def start_driver(path: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "unlearn", "pretrain", str(path), *options]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"RAY_ADDRESS": ""},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # here it may be ignored
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_driver_and_ctrl_c_leave_a_run_that_goes_on(uninterrupted, tmp_path):
    run = uninterrupted.model_copy(update={"run_dir": str(tmp_path / "run")})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(config.dump(run))))
    checkpoints = Checkpoints(run.run_dir, 2)

    driver = start_driver(path)
    until(lambda: driver.poll() is not None or checkpoints.steps())
    # Ray's two agents notice after a minute; they touch no run.
    started = [p for p in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in p.name()]
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(started, timeout=600)
    assert not left, "the dead driver's cluster lives on"
    first = checkpoints.steps()[-1]
    assert first < run.training.steps, "the run was over before the driver was killed"

    driver = start_driver(path, "--resume")
    until(lambda: driver.poll() is not None or checkpoints.steps()[-1] > first)
    driver.send_signal(signal.SIGINT)
    err = driver.communicate(timeout=600)[1]
    if checkpoints.steps()[-1] < run.training.steps:
        assert driver.returncode == 130 and "--resume" in err and "Traceback" not in err, err

    driver = start_driver(path, "--resume")
    assert driver.wait(timeout=600) == 0, driver.communicate()[1]
    assert last_weights(run) == last_weights(uninterrupted)


def test_a_mistake_in_a_worker_is_told_once(cluster, tiny_run):
    run = tiny_run("training.engine=deepspeed", "training.lr=1.0e+30", "training.clip=0", "training.schedule=constant")
    with pytest.raises(TrainingError, match="loss is not finite; stopped before the update") as told:
        train(run)
    assert str(told.value).count("not finite") == 1


def test_ray_train_starts_no_process_that_has_nothing_to_do(tmp_path, monkeypatch):
    """Neither for Ray's data sets, nor, on a cluster that ends with its driver, to tidy up behind it."""
    trainer = StoppableTrainer(lambda: None, run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path)))
    monkeypatch.delenv(own_cluster.FOLDER, raising=False)
    shared = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    monkeypatch.setenv(own_cluster.FOLDER, str(tmp_path))
    own = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert shared - own == {"PlacementGroupCleanerCallback"} and "DatasetsCallback" not in shared
    assert "BackendSetupCallback" in own
