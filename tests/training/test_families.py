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

# The first test of a kind trains for all of them.
pytestmark = pytest.mark.timeout(3600)
# lr: AdamW's first steps are lr x the gradient's sign, so gradients that are nearly zero would show as differences.
COMMON = ["training.micro_batch_size=4", "training.steps=4", "training.checkpoint_every=2", "training.lr=1e-4"]
SHARDED = ["training.engine=deepspeed", "cluster.workers=2"]
# Of each shape stage 3, which takes modules apart, and in turn one of those that share out less; the others are slow.
QUICK = {(shape, stage) for number, shape in enumerate(SMALL) for stage in (number % 3, 3)}
ALL = [(shape, stage) for shape in SMALL for stage in range(4)]
CASES = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL]


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory):
    """trained(shape, stage) -> (its run, that on plain torch, its run stopped behind step 2 and resumed)."""
    made: dict[tuple[str, int], tuple] = {}

    def of(shape: str, stage: int) -> tuple:
        if (shape, stage) not in made:
            quick = (shape, stage) in QUICK
            cases = [case for case in ALL if (case in QUICK) == quick]
            made.update(_trained(cases, tiny_shards, tmp_path_factory.mktemp("families")))
        return made[shape, stage]

    return of


def _trained(cases: list[tuple[str, int]], tiny_shards: str, folder: Path) -> dict[tuple[str, int], tuple]:
    """All in the same two processes, and those that go on in two others, which saves starting them."""
    plain, made = {}, {}
    for shape, stage in cases:
        same = [*COMMON, f"model.family={SMALL[shape][0]}"]
        model = str(folder / shape / "model")
        if shape not in plain:
            weights.write(build(shape), model, {})
            plain[shape] = tiny_config(folder / shape / "plain", tiny_shards, model, *same)
            worker(plain[shape])
        sharded = [*same, *SHARDED, f"training.zero_stage={stage}"]
        run = tiny_config(folder / shape / f"zero-{stage}", tiny_shards, model, *sharded)
        made[shape, stage] = run, plain[shape], run.model_copy(update={"run_dir": f"{run.run_dir}-stopped"})
    together([run for run, _, _ in made.values()], workers=2)
    for run, _, stopped in made.values():
        shutil.copytree(run.run_dir, stopped.run_dir)
        shutil.rmtree(Path(stopped.run_dir, "checkpoints", "step-00000004"))
        assert Checkpoints(stopped.run_dir, 2).steps() == [2]
    together([stopped for _, _, stopped in made.values()], workers=2)
    return made


@pytest.mark.parametrize(("shape", "stage"), CASES)
def test_a_zero_stage_trains_as_plain_torch(trained, shape, stage):
    run, plain, _ = trained(shape, stage)
    rows, expected = metrics.read(run.run_dir), metrics.read(plain.run_dir)
    assert len(rows) == len(expected) == 4
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "retain", "forget", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-7), name
    mine, theirs = (load_file(f"{export(r)}/weights.safetensors") for r in (run, plain))
    before = load_file(f"{plain.model.weights}/weights.safetensors")
    moved = max(float((theirs[n].float() - t.float()).abs().max()) for n, t in before.items())
    assert moved > 1e-4
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=0.25 * moved, rtol=0, msg=name)
        assert float((mine[name].float() - tensor.float()).square().mean().sqrt()) < 0.02 * moved, name
    trainable = {f"encoder.{n}" for n, _ in weights.build(run.model).encoder.named_parameters()}
    for after in (mine, theirs):
        assert after.keys() == before.keys()
        assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == trainable


@pytest.mark.parametrize(("shape", "stage"), CASES)
def test_resumed_it_ends_with_the_same_bits(trained, shape, stage):
    whole, _, stopped = trained(shape, stage)
    assert metrics.read(stopped.run_dir)[-1]["step"] == 4
    first, second = (Path(export(run), "weights.safetensors").read_bytes() for run in (whole, stopped))
    assert first == second
