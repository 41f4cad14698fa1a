"""DeepSpeed as it is used here: its configuration, and how an engine of it is made."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from unlearn.config import Training

BUCKET = 500_000_000  # elements of DeepSpeed's reduce bucket by default


def initialize(**options: Any) -> tuple[Any, Any, Callable]:
    """`deepspeed.initialize` inside a process group that exists: its engine, its optimizer, and the linear function to
    compute with.

    ZeRO-3 puts a linear function of its own, which keeps less and rounds differently, in the place of torch's, for all
    that follows in this process. It is taken back here, and in its place only in a block of `linear`.
    """
    if not (cuda := torch.cuda.is_available()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not cuda:
        # None of its own operations: the one for messages would be compiled, and gloo is enough. Left to itself it
        # looks for what each of them needs, with a compiler, in every worker.
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]  made when it is asked for
    with linear(nn.functional.linear):
        engine, optimizer, _, _ = deepspeed.initialize(**options, dist_init_required=False)
        return engine, optimizer, nn.functional.linear


@contextlib.contextmanager
def linear(function: Callable) -> Iterator[None]:
    """`function` in the place of torch's linear function."""
    before, nn.functional.linear = nn.functional.linear, function
    try:
        yield
    finally:
        nn.functional.linear = before


def config(settings: Training, accumulation: int, micro_batch: int, trained: int) -> dict:
    """The run's settings as a DeepSpeed configuration; trained: elements of all trained parameters."""
    # DeepSpeed allocates the whole bucket, and most models are smaller.
    zero: dict = {"stage": settings.zero_stage, "reduce_bucket_size": min(BUCKET, trained)}
    if settings.offload_optimizer and settings.zero_stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    told = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.clip,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.dtype == "bf16" and settings.zero_stage == 0:
        told["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif settings.dtype == "bf16":
        told |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return told
