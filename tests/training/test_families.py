"""Every family trains in every engine as in plain torch, resumes exactly, and keeps its decoder's bytes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import SMALL, build
from support.runs import export, tiny_config, worker
from support.workers import together

from unlearn.models import weights
from unlearn.training import metrics
from unlearn.training.checkpoint import Checkpoints

STAGES = range(4)
# lr: AdamW's first steps are lr x the gradient's sign, so gradients that are nearly zero would show as differences.
COMMON = ["training.micro_batch_size=4", "training.steps=4", "training.checkpoint_every=2", "training.lr=1e-4"]
SHARDED = ["training.engine=deepspeed", "cluster.workers=2"]


@pytest.fixture(scope="module", params=SMALL)
def trained(request, tiny_shards, tmp_path_factory):
    """{"plain", 0, 1, 2, 3: a run of this shape}."""
    folder = tmp_path_factory.mktemp(request.param)
    weights.write(build(request.param), str(folder / "model"), {})
    family = [f"model.family={SMALL[request.param][0]}"]

    def run(name, *options):
        return tiny_config(folder / f"run-{name}", tiny_shards, str(folder / "model"), *COMMON, *family, *options)

    runs = {"plain": run("plain")} | {stage: run(stage, *SHARDED, f"training.zero_stage={stage}") for stage in STAGES}
    worker(runs["plain"])
    together([runs[stage] for stage in STAGES], workers=2)
    return runs


@pytest.mark.parametrize("stage", STAGES)
def test_a_zero_stage_trains_as_plain_torch(trained, stage):
    rows, expected = metrics.read(trained[stage].run_dir), metrics.read(trained["plain"].run_dir)
    assert len(rows) == len(expected) == 4
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "retain", "forget", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-7), name
    mine, theirs = (load_file(f"{export(trained[n])}/weights.safetensors") for n in (stage, "plain"))
    moved = max(float((theirs[n].float() - t.float()).abs().max()) for n, t in small_state(trained).items())
    assert moved > 1e-4
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=0.25 * moved, rtol=0, msg=name)
        assert float((mine[name].float() - tensor.float()).square().mean().sqrt()) < 0.02 * moved, name


def small_state(runs) -> dict[str, torch.Tensor]:
    return load_file(f"{runs['plain'].model.weights}/weights.safetensors")


def test_only_the_encoder_moves(trained):
    before = small_state(trained)
    for run in trained.values():
        after = load_file(f"{export(run)}/weights.safetensors")
        assert after.keys() == before.keys()
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert changed and all(name.startswith("encoder.") for name in changed)
        trainable = {f"encoder.{n}" for n, _ in weights.build(run.model).encoder.named_parameters()}
        assert trainable == changed


def test_resumed_it_ends_with_the_same_bits(trained):
    pairs = [
        (trained[stage], trained[stage].model_copy(update={"run_dir": f"{trained[stage].run_dir}-stopped"}))
        for stage in (2, 3)
    ]
    for whole, stopped in pairs:
        shutil.copytree(whole.run_dir, stopped.run_dir)
        shutil.rmtree(Path(stopped.run_dir, "checkpoints", "step-00000004"))
        assert Checkpoints(stopped.run_dir, 2).steps() == [2]
    together([stopped for _, stopped in pairs], workers=2)
    for whole, stopped in pairs:
        assert metrics.read(stopped.run_dir)[-1]["step"] == 4
        first, second = (Path(export(run), "weights.safetensors").read_bytes() for run in (whole, stopped))
        assert first == second
