"""Any number of workers computes the same batches, also where it does not divide them; cluster.min_workers relies on
it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import export, tiny_config, train
from support.workers import together

from jobs import train as job
from unlearn import config
from unlearn.errors import ConfigError
from unlearn.training import metrics


@pytest.mark.parametrize(("workers", "stages"), [(3, (2, 3)), (5, (0,))])
def test_workers_that_do_not_divide_a_batch(tiny_shards, tiny_model, tmp_path, workers, stages):
    """Four micro-batches a step among three workers, and among five, of whom one never has any: losses, gradients and
    weights are those of one process."""
    same = ["training.micro_batch_size=2", "training.batch_size=8", "training.clip=0.1"]
    plain = tiny_config(tmp_path / "plain", tiny_shards, tiny_model, *same)
    deepspeed = [*same, "training.engine=deepspeed"]
    shared = [
        tiny_config(tmp_path / f"zero{z}", tiny_shards, tiny_model, *deepspeed, f"training.zero_stage={z}")
        for z in stages
    ]
    # As a worker group has it that has lost some, or found more: nothing is validated anew.
    shared = [run.model_copy(update={"cluster": run.cluster.model_copy(update={"workers": workers})}) for run in shared]
    train(plain)
    together(shared, workers)
    expected, weights = metrics.read(plain.run_dir), load_file(Path(plain.run_dir, "model/weights.safetensors"))
    for run in shared:
        rows = metrics.read(run.run_dir)
        for key in ("loss", "retain", "forget", "grad_norm"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=1e-3), key
        assert rows[-1]["workers"] == workers
        found = load_file(Path(export(run), "weights.safetensors"))
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_min_workers_in_the_config(tiny_run):
    def run(*overrides):
        return tiny_run("training.engine=deepspeed", "cluster.workers=4", *overrides)

    with pytest.raises(ConfigError, match="give training.micro_batch_size too"):
        run("cluster.min_workers=2")
    with pytest.raises(ConfigError, match="cluster.min_workers 5 is more than cluster.workers 4"):
        run("cluster.min_workers=5", "training.micro_batch_size=2")
    elastic = run("cluster.min_workers=3", "training.micro_batch_size=2")
    assert elastic.hash() == run("training.micro_batch_size=2").hash() and elastic.accumulation == 1
    fewer = elastic.model_copy(update={"cluster": config.Cluster(workers=3)})
    assert fewer.accumulation == 2


def test_lost_workers_are_told(tiny_run, monkeypatch):
    rows, messages = [], []
    monkeypatch.setattr(job.log, "warning", lambda text, *values: messages.append(text % values))
    told = job._telling_of_losses(tiny_run("training.engine=deepspeed", "cluster.workers=2").cluster, rows.append)
    for step, workers in ((90, 4), (10, 2), (20, 2), (15, 1), (25, 1), (30, 2), (25, 2)):
        told({"step": step, "workers": workers})
    told({"coding": 1, "of": 2})
    # What an attempt with more workers has left is no loss.
    assert messages == [
        "went back to a checkpoint; step 15 with 1 of 2 workers", "step 30 with 2 of 2 workers",
        "went back to a checkpoint; step 25 with 2 of 2 workers",
    ]  # fmt: skip
    assert len(rows) == 7
