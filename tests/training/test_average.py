"""The moving average of the weights: by the formula, resumed to the bit, exported beside the weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import export, tiny_config, worker
from support.workers import together
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from unlearn import config
from unlearn.errors import ConfigError
from unlearn.evaluation import comparison
from unlearn.training.average import Average
from unlearn.training.checkpoint import Checkpoints
from unlearn.training.fragments import Fragment

DECAY = 0.75
SAME = ("training.checkpoint_every=1", "training.keep_checkpoints=9", "training.micro_batch_size=4")


def run_of(folder, shards, model, *options):
    return tiny_config(folder, shards, model, f"training.ema={DECAY}", *SAME, *options)


def saved(run, step: int, kind: str) -> dict[str, torch.Tensor]:
    """Trained tensors of a checkpoint, or their average, flat."""
    whole: dict[str, list] = {}
    for file in Path(run.run_dir, "checkpoints", f"step-{step:08d}").glob("rank-*.safetensors"):
        for key, tensor in load_file(file).items():
            found, start, name = key.split("/", 2)
            if found == kind:
                whole.setdefault(name, []).append((int(start), tensor))
    return {name: torch.cat([t for _, t in sorted(pieces, key=lambda p: p[0])]) for name, pieces in whole.items()}


def exported(run) -> tuple[dict, dict]:
    export(run)
    return tuple(load_file(Path(run.run_dir, name, "weights.safetensors")) for name in ("model", "model_ema"))


@pytest.fixture(scope="module")
def plain(tiny_shards, tiny_model, tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("plain") / "run", tiny_shards, tiny_model)
    worker(run)
    return run


def test_it_is_that_of_the_formula(plain, tiny_model):
    first = load_file(Path(tiny_model, "weights.safetensors"))
    expected = {name: first[name].flatten() for name in saved(plain, 1, "weights")}
    for step in range(1, 5):
        weights, found = saved(plain, step, "weights"), saved(plain, step, "ema")
        expected = {name: DECAY * t + (1 - DECAY) * weights[name] for name, t in expected.items()}
        assert found.keys() == expected.keys() and len(found) > 20
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(t, weights[name]) for name, t in found.items())


def test_an_update_waits_for_no_value():
    """Tensors without data have none to wait for: reading one is an error."""
    with FakeTensorMode():
        flat = torch.empty(10)
        average = Average([Fragment("w", 0, 4, flat, 3, torch.optim.SGD([flat], lr=1.0))], DECAY)
        average.update()
        with pytest.raises(DataDependentOutputException):
            flat.sum().item()


def test_training_does_not_know_of_it(plain, tiny_shards, tiny_model, tmp_path):
    without = tiny_config(tmp_path / "run", tiny_shards, tiny_model, *SAME)
    worker(without)
    assert all(torch.equal(t, saved(plain, 4, "weights")[n]) for n, t in saved(without, 4, "weights").items())
    assert not saved(without, 4, "ema") and without.hash() != plain.hash()


def test_both_are_exported_and_either_is_measured(plain):
    model, average = exported(plain)
    trained, kept = saved(plain, 4, "weights"), saved(plain, 4, "ema")
    for name, tensor in model.items():
        assert torch.equal(tensor.flatten(), trained.get(name, tensor.flatten()))
        assert torch.equal(average[name].flatten(), kept[name] if name in kept else tensor.flatten())
    assert json.loads(Path(plain.run_dir, "model_ema", "model.json").read_text())["ema"] == DECAY
    for which, folder in (("trained", "model"), ("ema", "model_ema")):
        settings = plain.model_copy(update={"evaluation": plain.evaluation.model_copy(update={"weights": which})})
        assert comparison.generators(settings)["unlearned"].weights == f"{plain.run_dir}/{folder}"


def test_it_resumes_to_the_bit(plain, tmp_path):
    """Also where the weights alone would: an average that began anew would be another."""
    resumed = plain.model_copy(update={"run_dir": str(tmp_path / "run")})
    shutil.copytree(plain.run_dir, resumed.run_dir)
    for step in (3, 4):
        shutil.rmtree(Path(resumed.run_dir, "checkpoints", f"step-{step:08d}"))
    assert Checkpoints(resumed.run_dir, 9).steps() == [1, 2]
    worker(resumed)
    for kind in ("weights", "ema"):
        expected = saved(plain, 4, kind)
        assert all(torch.equal(t, expected[n]) for n, t in saved(resumed, 4, kind).items())


def test_sharded_it_is_the_same_and_resumes_to_the_bit(plain, tiny_shards, tiny_model, tmp_path):
    options = ("training.engine=deepspeed", "cluster.workers=2")
    whole = [
        run_of(tmp_path / f"whole-{stage}", tiny_shards, tiny_model, *options, f"training.zero_stage={stage}")
        for stage in (2, 3)
    ]
    together(whole, 2)
    stopped = [run.model_copy(update={"run_dir": run.run_dir.replace("whole", "stopped")}) for run in whole]
    for run, other in zip(whole, stopped, strict=True):
        shutil.copytree(run.run_dir, other.run_dir)
        for step in (3, 4):
            shutil.rmtree(Path(other.run_dir, "checkpoints", f"step-{step:08d}"))
    together(stopped, 2)
    for run, other in zip(whole, stopped, strict=True):
        for found, expected in zip(exported(other), exported(run), strict=True):
            assert all(torch.equal(t, expected[n]) for n, t in found.items())
        # The same global batches as in one process: the averages differ by rounding alone.
        for name, tensor in saved(plain, 4, "ema").items():
            torch.testing.assert_close(saved(run, 4, "ema")[name], tensor, rtol=1e-3, atol=1e-4)


def test_measuring_an_average_that_is_not_kept_is_a_mistake(tiny_shards, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="evaluation.weights ema: the run keeps no moving average; give training.ema"):
        config.parse(
            {
                "run_dir": str(tmp_path),
                "data": {"train": tiny_shards},
                "training": {"steps": 1},
                "evaluation": {"weights": "ema"},
            }
        )
