"""Oracles: the recipe of the original without the forget set, several seeds, on from where they were stopped."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.runs import export, tiny_config, worker

from jobs import oracle
from unlearn import config
from unlearn.errors import ConfigError
from unlearn.run import resolve

RECIPE = [
    "method.name=pretrain",
    "model.weights=null",
    "model.variant=vit_nano_patch4_32",
    "training.checkpoint_every=2",
]


def recipe(folder, tiny_shards, *more):
    """How an original is trained, on all rows."""
    return tiny_config(folder / "base", tiny_shards, "x", *RECIPE, "data.forget=null", *more)


def test_an_oracle_is_the_recipe_without_the_forget_set(tiny_shards, tiny_run, tmp_path, told):
    base, forgetting = recipe(tmp_path, tiny_shards), tiny_run()
    runs = [oracle.settings(base, forgetting, seed, str(tmp_path / "oracles")) for seed in (3, 4)]
    whole, left = (resolve(run).sets["retain"].rows for run in (base, runs[0]))
    forgotten = resolve(forgetting).sets["forget"].rows
    assert sorted([*left, *forgotten]) == sorted(whole) and len(forgotten)
    assert resolve(runs[0]).sets.keys() == {"retain"}
    assert runs[0].training == base.training and runs[0].model == base.model and [r.seed for r in runs] == [3, 4]

    # Trained by hand as `pretrain` would with what is kept named, it has the same bits; stopped and called again it
    # goes on.
    kept = recipe(tmp_path, tiny_shards, 'data.retain={"exclude_classes": ["ant"]}', f"run_dir={tmp_path / 'by-hand'}")
    worker(kept)
    base_file, run_file = tmp_path / "base.yaml", tmp_path / "run.yaml"
    base_file.write_text(config.dump(base))
    run_file.write_text(config.dump(forgetting))
    command = ["oracle", base_file, "--without", run_file, "--seeds", "2", "--dir", tmp_path / "oracles"]
    code, out, _ = told(*command)
    models = [f"{run.run_dir}/model" for run in runs]
    assert code == 0 and f"evaluation.oracle: [{', '.join(models)}]" in out
    cards = [json.loads(Path(m, "model.json").read_bytes()) for m in models]
    assert {card["without"] for card in cards} == {resolve(forgetting).sets["forget"].digest}
    by_hand, mine, other = (load_file(f"{m}/weights.safetensors") for m in (export(kept), *models))
    assert all((mine[n] == t).all() for n, t in by_hand.items()) and any((other[n] != t).any() for n, t in mine.items())
    before = [Path(m, "weights.safetensors").stat().st_mtime_ns for m in models]
    Path(models[1], "weights.safetensors").unlink()  # its tensors above are mapped from it
    Path(models[1], "weights.safetensors").write_bytes(b"cut")
    assert told(*command)[0] == 0
    after = [Path(m, "weights.safetensors").stat().st_mtime_ns for m in models]
    assert after[0] == before[0] and after[1] > before[1], "what is there stays, what is not whole is made"
    assert all((other[n] == t).all() for n, t in load_file(f"{models[1]}/weights.safetensors").items())
    for name in ("weights.safetensors", "model.json"):
        Path(models[1], name).unlink()
        assert not oracle.trained(runs[1])


def test_what_is_no_oracle_is_refused(tiny_shards, tiny_run, tmp_path):
    base = recipe(tmp_path, tiny_shards)
    for forgetting, message in (
        (base, "data.forget is missing: say with --without"),
        (tiny_run("data.forget.per_class=3"), "drawn with the seed"),
        (tiny_run("data.train=embedded:fashion-train"), "the original was trained on"),
    ):
        with pytest.raises(ConfigError, match=message):
            oracle.settings(base, forgetting, 0, str(tmp_path))
    with pytest.raises(ConfigError, match="method encoder_l2 does not train an original"):
        oracle.settings(tiny_run(), tiny_run(), 0, str(tmp_path))
