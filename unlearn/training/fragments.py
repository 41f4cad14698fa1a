"""Where a rank keeps its part of the training state: pieces of named tensors, whatever cut them.

Every ZeRO stage cuts the float32 master weights and the optimizer's state another way. A Fragment says which run of
elements of which parameter a rank holds, and where. Checkpoints speak of fragments alone, so they know no world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements start .. start + count of the flattened parameter `name`, kept in `flat` from `offset` on.

    flat: the float32 tensor that the optimizer `optimizer` steps; replicated: every rank holds the same.
    """

    name: str
    start: int
    count: int
    flat: torch.Tensor
    offset: int
    optimizer: torch.optim.Optimizer
    replicated: bool = False

    def master(self) -> torch.Tensor:
        """The weights (count,), float32, a view."""
        return self.flat.detach().view(-1)[self.offset : self.offset + self.count]

    def state(self, kind: str) -> torch.Tensor:
        """One of OPTIMIZER_STATE (count,), a view; there since the optimizer's first step."""
        return self.optimizer.state[self.flat][kind].view(-1)[self.offset : self.offset + self.count]

    def set_step(self, step: int) -> None:
        self.optimizer.state[self.flat]["step"].fill_(step)

    def reset(self) -> None:
        """The optimizer's state as before its first step."""
        for kind in OPTIMIZER_STATE:
            self.state(kind).zero_()
        self.set_step(0)


def whole(named: list[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    """Every parameter in one piece: plain torch, and ZeRO 0."""
    for name, p in named:
        yield Fragment(name, 0, p.numel(), p, 0, optimizer, replicated=True)


def zero12(named: list[tuple[str, torch.nn.Parameter]], zero) -> Iterator[Fragment]:
    """ZeRO 1 and 2, and DeepSpeed's bf16 optimizer: a rank's partition runs through the parameters' concatenation."""
    partitions = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    for name, p in named:
        # DeepSpeed's attribute; None where this rank holds nothing of the parameter.
        mapping = p._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is not None:
            at, flat = mapping.get_hp_fragment_address(), partitions[mapping.param_group_index]
            yield Fragment(name, mapping.lp_fragment_address.start, at.numel, flat, at.start, zero.optimizer)


def zero3(named: list[tuple[str, torch.nn.Parameter]], zero, rank: int) -> Iterator[Fragment]:
    """ZeRO 3: every parameter is cut into equal parts, one a rank, the last one padded."""
    for name, p in named:
        group, offset, size = zero.grad_position[zero.get_param_id(p)]
        start = rank * size
        count = min(size, p.ds_numel - start)  # pyright: ignore[reportAttributeAccessIssue]  DeepSpeed's
        if count > 0:
            yield Fragment(name, start, count, zero.fp32_partitioned_groups_flat[group], offset, zero.optimizer)
