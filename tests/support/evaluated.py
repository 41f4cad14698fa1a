"""Runs whose models are there, of random weights, to be measured."""

import torch

from unlearn import config
from unlearn.data import shards
from unlearn.evaluation import comparison
from unlearn.models import weights
from unlearn.run import resolve

TRAIN, TEST = "embedded:fashion-train", "embedded:fashion-test"
NANO = config.Model(variant="vit_nano_patch4_32")


def write_model(folder, seed, **options) -> str:
    """Random weights that paint something else with every seed."""
    model = weights.build(NANO.model_copy(update={"options": options}), seed)
    torch.nn.init.normal_(model.decoder.pred.bias, generator=torch.Generator().manual_seed(seed))
    weights.write(model, str(folder), {})
    return str(folder)


def make_run(root, **parts) -> config.RunConfig:
    """A run whose original and unlearned models are there, forgetting five images by their ids."""
    write_model(root / "original", 0)
    write_model(root / "run" / "model", 1)
    tree = {
        "name": "test", "run_dir": str(root / "run"), "model": {"weights": str(root / "original")},
        "data": {"train": TRAIN, "forget": {"ids": some_ids(5)}, "retain": {"classes": ["Bag", "Dress"]}},
        "training": {"engine": "torch", "steps": 1},
        "evaluation": {"data": TEST, "limit": 5, "batch_size": 2, "views": [{"kind": "random", "size": 0.5}],
            "pictures": 2},
    }  # fmt: skip
    for key, values in parts.items():
        tree[key] = tree.get(key, {}) | values
    return config.parse(tree)


def some_ids(count) -> list[str]:
    return shards.load(TRAIN).table(["id"], [1])["id"].to_pylist()[:count]


def compare(settings: config.RunConfig) -> comparison.Comparison:
    return comparison.Comparison(resolve(settings, measured=True), comparison.generators(settings))


def classes_of(rows) -> set[int]:
    return set(rows.labels.tolist())
