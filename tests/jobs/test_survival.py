"""Runs that are killed again and again: a worker, a whole node, the driver, the head with all its cluster; each ends
with the right weights.

UNLEARN_KILLS=20 python -m pytest -m slow -s tests/test_survival.py      20 kills in 5 runs
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from support.ray_nodes import TOKEN, Cluster, until
from support.runs import export, tiny_config
from support.workers import together

from jobs import submit
from jobs.backends.base import State
from jobs.backends.ray_jobs import RayJobs
from unlearn.training import metrics
from unlearn.training.checkpoint import Checkpoints

KINDS = ("worker", "node", "driver", "head")
# With max_failures -1 Ray Train never gives up; a driver that is killed is started again by whoever waits.
RUN = [
    "training.engine=deepspeed", "cluster.workers=2", "cluster.min_workers=1", "cluster.max_failures=-1",
    "training.micro_batch_size=4",
    "training.steps=1200", "training.checkpoint_every=20", "training.log_every=20", "training.schedule=constant",
    "method.name=pretrain",
]  # fmt: skip


def strike(cluster: Cluster, kind: str, chance: random.Random) -> None:
    """Kill, and put back what a cluster's operator would put back."""
    if kind == "node":
        cluster.kill("second")
        cluster.start_second()
    elif kind == "head":
        cluster.close()
        cluster.start_head()
        cluster.start_second()
    else:
        wanted = "RayTrainWorker" if kind == "worker" else "unlearn"

        def victims() -> list[psutil.Process]:
            found = cluster.processes("head") + cluster.processes("second")
            return [p for p in found if wanted in " ".join(p.cmdline() or [p.name()]) and not p.name().startswith("sh")]

        os.kill(chance.choice(until(victims)).pid, signal.SIGKILL)


def survive(cluster: Cluster, run, kinds: list[str], chance: random.Random) -> list[tuple[str, int]]:
    """Train through the kills; returns each with the step that was saved before it."""
    place, sent, struck = RayJobs(cluster.address), submit.request(run), []

    def saved() -> int:
        """The newest step. The same request again and again starts the job anew where it failed or is forgotten."""
        time.sleep(0.5)
        submit.submit(place, sent)
        return (Checkpoints(run.run_dir, 2).steps() or [0])[-1]

    for kind in kinds:
        at = saved() + chance.randrange(20, 100)
        until(lambda at=at: saved() >= at, 900)
        struck.append((kind, saved()))
        strike(cluster, kind, chance)
    until(lambda: saved() == run.training.steps, 1800)
    ended = submit.wait(place, sent.id, retries=3)
    assert ended.state == State.SUCCEEDED, "".join(place.logs(sent.id, False))
    return struck


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_killed_run_ends_with_the_right_weights(tiny_shards, tiny_model, tmp_path, monkeypatch):
    """With both workers all along the weights are those of an unbroken run to the bit; while one node is away a step is
    summed in another order, so then they are the same up to rounding."""
    kills, chance = int(os.environ.get("UNLEARN_KILLS", 4)), random.Random(4)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    whole = tiny_config(tmp_path / "whole", tiny_shards, tiny_model, *RUN)
    together([whole], 2)
    expected = load_file(Path(export(whole), "weights.safetensors"))
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            for number in range(-(-kills // len(KINDS))):
                run, began = whole.model_copy(update={"run_dir": str(tmp_path / str(number))}), time.monotonic()
                struck = survive(cluster, run, chance.sample(KINDS, len(KINDS)), chance)
                found = load_file(Path(run.run_dir, "model/weights.safetensors"))
                apart = max((found[name] - value).abs().max().item() for name, value in expected.items())
                workers = sorted({row["workers"] for row in metrics.read(run.run_dir)})
                print(
                    f"\nrun {number}: {struck} in {time.monotonic() - began:.0f} s, workers {workers}, weights differ "
                    f"by at most {apart:.1e}"
                )
                assert apart == 0 if workers == [2] else apart < 1e-3
        finally:
            cluster.close()
