"""What goes wrong on a device, told as the user can act on it."""

import contextlib
from collections.abc import Iterator

import torch

from unlearn import config
from unlearn.errors import TrainingError
from unlearn.training.engine import Engine

# What to do where a device has no memory left.
LESS_AT_ONCE = (
    "lower training.micro_batch_size, or set activation_checkpointing, a higher zero_stage or offload_optimizer"
)
LESS_TO_KEEP = (
    "let other work on it end, raise cluster.gpus_per_worker where workers share it, or with training.engine: "
    "deepspeed take more workers and zero_stage 3"
)


@contextlib.contextmanager
def room(what: str, advice: str) -> Iterator[None]:
    """Raises TrainingError where the device has no memory left for `what`."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        short = str(e).splitlines()[0][:120]
        raise TrainingError(f"{what} does not fit on the device ({short}): {advice}") from None


@contextlib.contextmanager
def told(settings: config.RunConfig, engine: Engine) -> Iterator[None]:
    """Translate a failure on the device into a message for the user."""
    try:
        with room(f"a micro-batch of {settings.micro_batch} rows", LESS_AT_ONCE):
            yield
    except RuntimeError as e:
        if "is not finite" in str(e):
            what = str(e).splitlines()[0]
        elif "device-side assert" in str(e) and engine.finite.culprit():
            what = f"the {engine.finite.culprit()} is not finite"
        else:
            raise
        raise TrainingError(
            f"{what}; stopped before the update, and the checkpoints before it are kept. The same settings lead here "
            "again: start a new run_dir with a lower training.lr or method.alpha, or look at the data"
        ) from None
