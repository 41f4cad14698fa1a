"""Saliency mask (SalUn, arXiv 2310.12508): of the trained weights only those move that the forget term depends on most.

|gradient of the forget term| is measured once, before the first step, over the first global batches of the run and all
workers. The mask is part of the trainer's state. Gradients are masked as they arise, which every engine and ZeRO stage
takes for the gradients themselves; weight decay would move the other weights, and is refused.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from unlearn.data.loader import Batch
from unlearn.methods.base import Gradients, Method, Terms
from unlearn.models.base import Adapter
from unlearn.training import ranks
from unlearn.training.engine import Engine

BATCHES = 4  # global batches that it is measured over
_PREFIX = "saliency/"

# Parameter -> whether each of its elements, in order, may move.
Masks = dict[str, torch.Tensor]


def measured(engine: Engine, steps: Iterable[Iterable[Batch]], share: float) -> Masks:
    """The masks of the `share` of all trained weights whose gradients are largest, the same on every rank. steps: the
    micro-batches of this rank, step by step. All ranks call it together; weights and optimizer stay as they were."""
    objective, method = engine.objective, engine.objective.method
    sums = {name: torch.zeros(_count(p), device=engine.device) for name, p in engine.named}
    taken = _ForgetAlone(method, lambda gradients: _add(sums, [name for name, _ in engine.named], gradients))
    hooks = [] if method.gradients_apart else [p.register_hook(_adding(sums[name])) for name, p in engine.named]
    objective.method = taken
    try:
        for batches in steps:
            engine.step(batches, 0.0)
    finally:
        objective.method = method
        for hook in hooks:
            hook.remove()
    for fragment in engine.fragments():
        fragment.reset()
    if ranks.grouped() and not method.gradients_apart:  # else they were reduced before
        for total in sums.values():
            dist.all_reduce(total)
    sizes = torch.cat([total.abs() for total in sums.values()])
    limit = sizes.kthvalue(len(sizes) - max(1, round(share * len(sizes))) + 1).values
    return {name: (total.abs() >= limit) & (total != 0) for name, total in sums.items()}


def apply(engine: Engine, masks: Masks) -> None:
    """From now on no other weight moves."""
    for name, p in engine.named:
        p.register_hook(_masking(masks[name].to(engine.device)))


def packed(masks: Masks) -> dict[str, torch.Tensor]:
    """The masks as tensors of a checkpoint, a bit an element."""
    return {f"{_PREFIX}{name}": torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in masks.items()}


def unpacked(engine: Engine, state: dict[str, torch.Tensor]) -> Masks:
    """What `packed` gave, of this engine's parameters."""
    bits = {name: np.unpackbits(state[f"{_PREFIX}{name}"].numpy(), count=_count(p)) for name, p in engine.named}
    return {name: torch.from_numpy(each.astype(bool)) for name, each in bits.items()}


class _ForgetAlone(Method):
    """A method's forget term as the whole loss; its gradient, where the method wants gradients apart, is told to
    `tell`."""

    name = "forget_alone"

    def __init__(self, method: Method, tell: Callable[[list[torch.Tensor]], None]):
        super().__init__(method.options)
        self.method, self.tell = method, tell
        # The engine was made for the method's way of going back.
        self.gradients_apart = method.gradients_apart  # pyright: ignore[reportAttributeAccessIssue]

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        return {"forget": self.method.terms(batch, student, teacher)["forget"]}

    def combine(self, gradients: Gradients, dot) -> list[torch.Tensor]:
        self.tell(gradients["forget"])
        return [torch.zeros_like(gradient) for gradient in gradients["forget"]]


def _count(p: nn.Parameter) -> int:
    """Elements of a parameter, also of one that ZeRO-3 has taken apart."""
    return getattr(p, "ds_numel", p.numel())


def _add(sums: dict[str, torch.Tensor], names: list[str], gradients: list[torch.Tensor]) -> None:
    for name, gradient in zip(names, gradients, strict=True):
        sums[name] += gradient.flatten()


def _adding(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(gradient: torch.Tensor) -> None:
        total.add_(gradient.detach().flatten())

    return add


def _masking(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: gradient * mask.view_as(gradient)


def steps(batches: Iterator[Batch], accumulation: int) -> Iterator[list[Batch]]:
    """Micro-batches in the groups that a step takes."""
    for first in batches:
        yield [first, *(next(batches) for _ in range(accumulation - 1))]
