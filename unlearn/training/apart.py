"""The gradient of each term of a loss on its own, for methods that say how they are put together."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from unlearn.methods.base import Gradients, Method, Terms
from unlearn.training import ranks


class TermGradients:
    """Float32 means of the terms' gradients over the micro-batches of all ranks.

    Each term's takes as much memory as the trained weights in float32.

    count: micro-batches of this rank.
    """

    def __init__(self, trained: list[nn.Parameter], count: int):
        self.trained, self.count = trained, count
        self._flat: dict[str, torch.Tensor] = {}

    def add(self, terms: Terms) -> None:
        """Take up the terms of one micro-batch, whose graph is gone afterwards."""
        left = [name for name in terms if terms[name].requires_grad]
        for name in terms:
            if name not in self._flat:
                self._flat[name] = torch.zeros(sum(p.numel() for p in self.trained), device=self.trained[0].device)
        while left:
            name = left.pop(0)
            found = torch.autograd.grad(terms[name], self.trained, retain_graph=bool(left), allow_unused=True)
            for total, gradient in zip(self._shaped(self._flat[name]), found, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=1 / self.count)

    @torch.no_grad()
    def combined(self, method: Method) -> list[torch.Tensor]:
        """What the method makes of them, float32, on every rank the same. All ranks call it together."""
        if ranks.grouped():
            for flat in self._flat.values():
                dist.all_reduce(flat)
                flat /= dist.get_world_size()
        gradients: Gradients = {name: self._shaped(flat) for name, flat in self._flat.items()}
        return [gradient.float() for gradient in method.combine(gradients, dot)]

    def _shaped(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pieces = flat.split([p.numel() for p in self.trained])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.trained, strict=True)]


def dot(one: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
    """The inner product of two gradients over all parameters, a scalar on the device."""
    products = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True)]
    return torch.stack(products).sum()


@dataclass(frozen=True)
class Imposed:
    """A gradient that the parameters are to have."""

    parameters: list[nn.Parameter]
    gradient: list[torch.Tensor]

    def loss(self) -> torch.Tensor:
        """A scalar with this gradient, by which an engine that reduces gradients in a backward pass is given it."""
        products = [(p * g.to(p.dtype)).sum() for p, g in zip(self.parameters, self.gradient, strict=True)]
        return torch.stack(products).sum()
