"""The steps of a run from its configuration alone, as the command line takes them one after the other."""

from collections.abc import Callable

import torch

from jobs import evaluate as evaluation
from jobs import train as training
from unlearn import config
from unlearn.config import RunConfig
from unlearn.data.loader import Batch
from unlearn.methods import base as methods
from unlearn.methods.base import Method
from unlearn.models.base import Adapter
from unlearn.run import resolve
from unlearn.training import loop
from unlearn.training.engine import Objective
from unlearn.training.export import export as export_run


def worker(settings: RunConfig, report: Callable[[dict], None] = lambda row: None) -> None:
    """Train in this process."""
    loop.worker(resolve(settings), report)


def export(settings: RunConfig) -> str:
    """Write the model of a trained run; its folder."""
    return export_run(resolve(settings))


def train(settings: RunConfig, resume: bool = False, progress: Callable[[dict], None] = lambda row: None) -> str:
    """Check, train and export, as `unlearn run` does; the model's folder."""
    return training.train(training.prepare(settings, resume), progress)


def evaluate(
    settings: RunConfig, progress: Callable[[int, int], None] = lambda done, total: None, show_forget: bool = False
) -> dict:
    """Measure a run; what is in metrics.json."""
    return evaluation.evaluate(resolve(settings, measured=True), progress, show_forget)


def report(settings: RunConfig, show_forget: bool = False) -> str:
    """Write report.html anew; its path."""
    return evaluation.write_report(resolve(settings, measured=True), show_forget)


def losses(method: Method, batch: Batch, student: Adapter, teacher: Adapter | None = None) -> dict[str, torch.Tensor]:
    """The loss of one micro-batch and its terms, as a step sees them."""
    return Objective(student, method, teacher)(batch)


def method(name: str = "encoder_l2", **options) -> Method:
    """A method with these options."""
    return methods.create(methods.method_class(name).Options(name=name, **options))


def tiny_config(run_dir, data: str, model: str, *overrides: str) -> config.RunConfig:
    """Forget class ant of the small data set with the small model, four steps on plain torch; overrides:
    "a.b=value"."""
    tree = {
        "run_dir": str(run_dir), "seed": 3, "model": {"weights": model},
        "data": {"train": data, "forget": {"classes": ["ant"]}},
        "training": {"engine": "torch", "steps": 4, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 2, "log_every": 1},
        "evaluation": {"limit": 8, "batch_size": 8},
    }  # fmt: skip
    return config.parse(config.override(tree, list(overrides)))
