"""An audit can say no, and yes: of the original, of two shams, and of a model that was trained anew without the forget
set."""

import pytest
import torch
from support import runs

from jobs import audit as job
from unlearn import config
from unlearn.audit import settings as audits
from unlearn.data.storage import Storage
from unlearn.models import weights
from unlearn.run import resolve

FORGET = ["Trouser", "Sandal", "Sneaker", "Bag", "Ankle boot"]
SHAPE = {
    "image_size": 32, "patch_size": 8, "width": 64, "depth": 3, "heads": 4, "decoder_width": 64, "decoder_depth": 2,
    "decoder_heads": 4,
    "mean": [0.22] * 3, "std": [0.32] * 3,
}  # fmt: skip
AUDIT = [
    "limit=500", "resamples=200", "membership.views=2", "probes.images=24", "probes.steps=60", "relearning.steps=20",
    "relearning.watched=100", "relearning.draws=1",
]  # fmt: skip


def trained(folder, seed: int, retain: dict | None, steps: int = 300) -> str:
    """A small autoencoder of clothes; its folder."""
    tree = {
        "run_dir": str(folder), "seed": seed, "model": {"options": SHAPE}, "method": {"name": "pretrain"},
        "data": {"train": "embedded:fashion-train", "retain": retain, "cache": "decoded"},
        "train_views": [{"kind": "random", "size": [0.5, 0.75]}, {"size": 0.5}],
        "training": {"engine": "torch", "steps": steps, "batch_size": 64, "lr": 3e-3, "warmup_steps": 20,
            "checkpoint_every": steps},
    }  # fmt: skip
    settings = config.parse(tree)
    runs.worker(settings)
    return runs.export(settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """The folders of an original, of an oracle, and of another oracle that differs by its seed."""
    folder = tmp_path_factory.mktemp("models")
    kept = {"exclude_classes": FORGET}
    made = {"original": (0, None), "oracle": (1, kept), "twin": (2, kept)}
    return {name: trained(folder / name, seed, retain) for name, (seed, retain) in made.items()}


def run_of(folder, models: dict[str, str], **method) -> config.RunConfig:
    return config.parse({
        "run_dir": str(folder / "run"), "model": {"weights": models["original"]}, "method": method,
        "data": {"train": "embedded:fashion-train", "forget": {"classes": FORGET}, "cache": "decoded"},
        "training": {"engine": "torch", "steps": 3, "batch_size": 8},
        "evaluation": {"data": "embedded:fashion-test", "oracle": models["oracle"]},
    })  # fmt: skip


def verdict(settings: config.RunConfig, *overrides: str) -> dict:
    return job.audit(resolve(settings, measured=True), audits.load(None, [*AUDIT, *overrides]))


def failed(document: dict) -> set[str]:
    return {name for name in document["tests"] if document[name]["verdict"] == "FAIL"}


def claiming(folder, models: dict[str, str], unlearned: torch.nn.Module | str) -> config.RunConfig:
    """A run whose unlearned model is the one given."""
    settings = run_of(folder, models)
    if isinstance(unlearned, str):
        unlearned = weights.build(config.Model(weights=unlearned))
    weights.write(unlearned, Storage(settings.run_dir).where("model"), {})
    return settings


def test_the_original_and_a_sham_that_forgets_nothing_fail(models, tmp_path):
    original = verdict(claiming(tmp_path / "a", models, models["original"]), "tests=[transfer,probes,relearning]")
    assert original["verdict"] == "FAIL" and failed(original) == {"transfer", "probes", "relearning"}
    nothing = run_of(tmp_path / "b", models, alpha=0)
    runs.train(nothing)
    assert verdict(nothing, "tests=[transfer]")["verdict"] == "FAIL"


def test_a_sham_that_only_blurs_its_output_fails(models, tmp_path):
    blurred = weights.build(config.Model(weights=models["original"]))
    with torch.no_grad():
        for p in (blurred.decoder.pred.weight, blurred.decoder.pred.bias):
            pixels = p.view(64, 3, -1)
            pixels.copy_(pixels.mean(0, keepdim=True).expand_as(pixels))
    document = verdict(claiming(tmp_path, models, blurred), "tests=[probes,relearning]")
    assert document["verdict"] == "FAIL" and "original decoder" in next(
        r for r in document["probes"]["reasons"] if "beyond" in r
    )


def test_a_model_trained_anew_without_the_forget_set_passes(models, tmp_path):
    document = verdict(claiming(tmp_path, models, models["twin"]))
    assert document["verdict"] == "PASS", "\n".join(r for name in document["tests"] for r in document[name]["reasons"])
    assert document["transfer"]["verdict"] == "PASS" and not failed(document)
