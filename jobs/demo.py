"""The demo's configuration: embedded by default, or the same job on other shards and weights."""

import copy
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files

import yaml

from unlearn import config
from unlearn.errors import ConfigError

CONFIG = "configs/demo_fashion.yaml"


def demo_config(
    data: str | None = None, model: str | None = None, forget: list[str] | None = None, run_dir: str | None = None,
    overrides: Sequence[str] = (),
) -> config.RunConfig:  # fmt: skip
    """The demo as a RunConfig. data, model: other shards and weights, both or none; forget: class names or labels."""
    if (data is None) != (model is None):
        raise ConfigError("give --data and --model together: a model belongs to its images")
    tree = yaml.safe_load((files("jobs") / CONFIG).read_text())
    forgotten = copy.deepcopy(tree["data"]["forget"])  # what the embedded oracle has never seen
    if data is not None:
        tree["data"]["train"], tree["model"]["weights"] = data, model
        tree["evaluation"] |= {"data": None, "oracle": None}
        tree["data"]["forget"]["classes"] = _half(data)
    if forget:
        tree["data"]["forget"]["classes"] = [int(c) if c.isdigit() else c for c in forget]
    tree["run_dir"] = run_dir or f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}"
    tree = config.override(tree, overrides)
    if tree["data"]["forget"] != forgotten and not any(o.startswith("evaluation.oracle=") for o in overrides):
        tree["evaluation"]["oracle"] = None  # it has seen what is now forgotten
    return config.parse(tree, "demo")


def _half(data: str) -> list[int]:
    from unlearn.data import shards

    labels = sorted({label for label in shards.load(data).table(["label"])["label"].to_pylist()})
    if len(labels) < 2:
        raise ConfigError(f"{data}: only one class there; at least two are needed to forget half of them")
    return labels[: len(labels) // 2]
