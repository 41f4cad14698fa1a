"""A point of a sweep as a run of its own: the configuration with which `unlearn run` would make the same model."""

import copy
from collections.abc import Sequence
from typing import Any

import yaml

from unlearn import config
from unlearn.config import Evaluation, RunConfig
from unlearn.data.storage import Storage
from unlearn.search.records import Point, Trial
from unlearn.search.space import Sweep

PRIVATE = ("ids", "subjects")  # keys whose values name images or persons


def tree(
    sweep: Sweep, point: Point | Trial, seed: int, model: str | None = None, run_dir: str | None = None
) -> dict[str, Any]:
    """What the sweep's file says of the run, with the values of the point; measured on its own held-out images."""
    run = config.override(
        copy.deepcopy(sweep.run), [f"{key}={_yaml(value)}" for key, value in point.parameters.items()]
    )
    run["seed"] = seed
    run["run_dir"] = run_dir or f"runs/{sweep.name}-{point.id}"
    return config.override(run, [f"model.weights={_yaml(model)}"] if model else [])


def settings(sweep: Sweep, trial: Trial, run_dir: str | None = None) -> RunConfig:
    """The run of a trial in its own folder, or in `run_dir`; measured on held-out images, where the run names some,
    not on those that were tuned on. Raises ConfigError."""
    return config.parse(
        tree(sweep, trial, trial.seed, trial.model, run_dir or Storage(sweep.sweep_dir).where(trial.run)), trial.id
    )


def evaluation(sweep: Sweep) -> Evaluation:
    """How the run measures when it runs alone."""
    return Evaluation.model_validate(sweep.run.get("evaluation") or {})


def text(sweep: Sweep, point: Point | Trial, seed: int, model: str | None = None, masked: bool = False) -> str:
    """The same tree as YAML. masked: ids and subjects are counted, not named."""
    made = tree(sweep, point, seed, model)
    return yaml.safe_dump(mask(made) if masked else made, sort_keys=False, width=100, default_flow_style=None)


def mask(value: Any, key: str = "") -> Any:
    """A tree whose ids and subjects are only counted, for what others may see."""
    if isinstance(value, dict):
        return {name: mask(inner, name) for name, inner in value.items()}
    if key.rpartition(".")[2] in PRIVATE and isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value)} {key.rpartition('.')[2]}, not told here"
    return value


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
