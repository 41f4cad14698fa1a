"""The frozen original E0: no gradient, no optimizer state, no decoder; sharded where the student is (ZeRO-3)."""

import torch

from unlearn import config
from unlearn.models import weights
from unlearn.models.base import Adapter
from unlearn.training import zero


def load(
    settings: config.RunConfig, device: torch.device, decoder: bool, sources: weights.Sources | None = None
) -> Adapter:
    """The teacher on its device, in the run's dtype, in eval mode. sources: what has been looked up of its weights."""
    teacher = weights.build(settings.model, settings.seed, sources, decoder).requires_grad_(False)
    teacher.take_first_stage(torch.device("cpu"))  # the student's serves both
    teacher = teacher.to(device, dtype(settings)).eval()
    return (
        _sharded(teacher, settings)
        if settings.training.engine == "deepspeed" and settings.training.zero_stage == 3
        else teacher
    )


def dtype(settings: config.RunConfig) -> torch.dtype:
    """Of the teacher's weights."""
    training = settings.training
    bf16 = training.dtype == "bf16" and training.engine == "deepspeed" and training.zero_stage > 0
    return torch.bfloat16 if bf16 else torch.float32


def _sharded(teacher: Adapter, settings: config.RunConfig) -> Adapter:
    """Each rank keeps its share; parameters are gathered for the forward of the module that owns them."""
    how = zero.config(settings.training, 1, 1, 0) | {"zero_optimization": {"stage": 3}}
    # Part by part: DeepSpeed learns what to fetch ahead from calls of the very module it was given.
    for name in ("encoder", "decoder", "shared"):
        if (part := getattr(teacher, name)) is not None:
            engine, *_ = zero.initialize(model=part, config=how)
            setattr(teacher, name, engine.module)
    return teacher.eval()
