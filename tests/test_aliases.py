"""What was written under former names is still understood."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.models import SMALL
from support.runs import export, tiny_config, worker

from unlearn import aliases, config
from unlearn.errors import CheckpointError
from unlearn.models import weights
from unlearn.training.checkpoint import Checkpoints

FORMER = {
    "run_dir": "runs/x",
    "model": {"family": "vqgan", "variant": "mage_nano_32", "front": "/tokenizer"},
    "data": {"train": "/data", "codes": "/codes", "code_views": 3},
    "method": {"name": "pretrain_front", "alpha": 0.25, "noise": "standard", "noise_region": None, "distance": "mse"},
    "training": {"steps": 1},
}


def test_former_keys_and_values_are_read_with_a_warning(caplog):
    run = config.parse(FORMER, "old.yaml")
    assert (run.model.family, run.model.first_stage, run.method.name) == ("mage", "/tokenizer", "pretrain_first_stage")
    assert run.data.latent_cache == "/codes" and run.data.latent_views == 3
    told = [record.getMessage() for record in caplog.records]
    assert "old.yaml: model.front is now called model.first_stage" in told and len(told) == 9
    caplog.clear()
    assert config.parse(run.model_dump(mode="json")) == run and not caplog.records


def test_the_first_hash_is_what_it_was():
    """As the version before the second schema computed it for the demo's configuration."""
    run = config.load(Path(__file__).parents[1] / "jobs/configs/demo_fashion.yaml")
    assert aliases.first_hash(run).startswith("9a763a61654d93e7") and run.hash() != aliases.first_hash(run)


def test_the_hash_is_of_what_differs_from_the_defaults():
    tree = {"run_dir": "r", "data": {"train": "/d", "forget": {"classes": [1]}}, "training": {"steps": 5}}
    run = config.parse(tree)
    told = {"training": {"steps": 5, "lr": 1e-4}, "method": {"name": "encoder_l2", "alpha": 0.25}, "seed": 0}
    assert config.parse(tree | told).hash() == run.hash(), "a default that is written down changes nothing"
    assert config.parse(tree | {"method": {"name": "encoder_l2", "alpha": 0.5}}).hash() != run.hash()
    assert config.parse(tree | {"cluster": {"workers": 2}, "name": "other"}).hash() != run.hash(), (
        "the micro-batch is another"
    )
    same = {"training": {"steps": 5, "micro_batch_size": 32}, "cluster": {"workers": 2}, "name": "other"}
    assert (
        config.parse(tree | same).hash()
        == config.parse(tree | {"training": {"steps": 5, "micro_batch_size": 32}}).hash()
    )


def test_a_checkpoint_with_the_first_hash_goes_on(tiny_shards, tiny_model, tmp_path):
    whole, stopped = (tiny_config(tmp_path / name, tiny_shards, tiny_model) for name in ("whole", "stopped"))
    worker(whole)
    worker(stopped.model_copy(update={"training": stopped.training.model_copy(update={"steps": 4})}))
    commit = next(Path(stopped.run_dir).glob("checkpoints/step-*2/COMMIT"))
    for newer in Path(stopped.run_dir).glob("checkpoints/step-*4/*"):
        newer.unlink()
    tree = json.loads(commit.read_text())
    tree["state"]["config"] = aliases.first_hash(stopped)
    commit.write_text(json.dumps(tree))
    worker(stopped)
    one, other = (load_file(Path(export(run), "weights.safetensors")) for run in (whole, stopped))
    assert all((one[name] == other[name]).all() for name in one)
    tree["state"]["config"] = "0" * 64
    with pytest.raises(CheckpointError, match="written with another config"):
        last = Checkpoints(stopped.run_dir, 2)
        path = Path(stopped.run_dir, f"checkpoints/step-{last.steps()[-1]:08d}/COMMIT")
        held = json.loads(path.read_text())
        held["state"]["config"] = "0" * 64
        path.write_text(json.dumps(held))
        worker(stopped)


def test_a_model_folder_with_former_names_is_read(tmp_path):
    family, options = SMALL["mage"]
    built = weights.build(config.Model(family=family, options=options), seed=1)
    weights.write(built, str(tmp_path / "model"), {})
    file, card = tmp_path / "model" / weights.WEIGHTS, tmp_path / "model" / weights.CARD
    former = {
        f"front.{name.removeprefix('first_stage.')}" if name.startswith("first_stage.") else name: tensor.clone()
        for name, tensor in load_file(file).items()
    }
    assert any(name.startswith("front.") for name in former)
    save_file(former, file)
    card.write_text(json.dumps(json.loads(card.read_text()) | {"family": "vqgan"}))
    again = weights.build(config.Model(family=weights.family(str(tmp_path / "model")), weights=str(tmp_path / "model")))
    assert all((tensor == again.state_dict()[name]).all() for name, tensor in built.state_dict().items())
