"""A measurement is of the model at hand: what it was trained with, and nothing else, may be said of it."""

import hashlib
import logging
from pathlib import Path

import pytest
from support.runs import tiny_config, train

from unlearn import config
from unlearn import run as runs
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.evaluation import provenance


@pytest.fixture(scope="module")
def done(tiny_shards, tiny_model, tmp_path_factory):
    """The configuration of a finished run."""
    settings = tiny_config(tmp_path_factory.mktemp("done") / "run", tiny_shards, tiny_model, "training.steps=1")
    train(settings)
    return settings


def checked(done, *overrides: str, **changes) -> str:
    settings = runs.load(changes.get("source", done.run_dir), overrides)
    return provenance.check(runs.resolve(settings, measured=True))


@pytest.mark.parametrize(
    "items, keys",
    [(["method.alpha=123"], ["method.alpha"]), (["seed=9", "training.lr=0.5"], ["seed", "training.lr"]),
        (["data.forget={classes: [bee]}"], ["data.forget.classes"]),
     (["training.checkpoint_every=7"], ["training.checkpoint_every"]),
     (["train_views=[{size: 0.3}]"], ["train_views"])],
)  # fmt: skip
def test_another_configuration_is_refused_and_its_keys_are_named(done, items, keys):
    with pytest.raises(ConfigError, match="was trained with other settings") as told:
        checked(done, *items)
    assert f"other settings: {', '.join(keys)}. " in str(told.value)


@pytest.mark.parametrize(
    "item",
    [
        "name=other",
        "evaluation.limit=5",
        "evaluation.views=[{size: 0.3}]",
        "data.cache=none",
        "storage.patience=5",
        "cluster.cpus_per_worker=0.5",
    ],
)
def test_what_only_the_evaluation_reads_may_differ(done, item):
    assert checked(done, item) == done.hash()


def test_the_command_refuses_and_writes_nothing(done, told):
    code, _, err = told("evaluate", done.run_dir, "--set", "method.alpha=123")
    assert code == 2 and "method.alpha" in err and not Storage(done.run_dir).is_file("metrics.json")


def test_a_configuration_that_was_edited_in_the_run_folder_is_found(done, tmp_path):
    for name in ("config.yaml", "model/model.json"):
        Storage(tmp_path).write(name, Storage(done.run_dir).read(name))
    Storage(tmp_path).write("config.yaml", config.dump(done).replace("alpha: 0.25", "alpha: 123.0").encode())
    with pytest.raises(ConfigError, match="trained with another configuration .hash"):
        checked(done, source=str(tmp_path))
    Storage(tmp_path).delete("config.yaml")
    settings = done.model_copy(update={"run_dir": str(tmp_path)})
    assert provenance.check(runs.resolve(settings, measured=True)) == done.hash()


def test_other_weights_are_refused_and_other_data_is_warned_of(done, tmp_path, tiny_model, caplog):
    other = tmp_path / "other"
    Storage(other).write("weights.safetensors", Path(tiny_model, "weights.safetensors").read_bytes())
    assert checked(done, f"model.weights={other}/weights.safetensors") == done.hash()  # the same, elsewhere
    run = runs.resolve(runs.load(done.run_dir), measured=True)
    run.origin["retain"] = "0" * 64
    with caplog.at_level(logging.WARNING):
        provenance.check(run)
    assert "the data is not what the model was trained on (retain)" in caplog.text
    run.origin["weights"] = "0" * 64
    with pytest.raises(ConfigError, match="started from other weights than model.weights names"):
        provenance.check(run)


def test_what_a_job_was_sent_is_what_it_runs(done, tmp_path):
    text = config.dump(done).encode()
    sent = tmp_path / "configs" / f"{hashlib.sha256(text).hexdigest()[:16]}.yaml"
    Storage(tmp_path).write(f"configs/{sent.name}", text)
    assert runs.load(str(sent)) == done
    Storage(tmp_path).write(f"configs/{sent.name}", text.replace(b"0.25", b"123."))
    with pytest.raises(ConfigError, match="changed after it was sent"):
        runs.load(str(sent))
