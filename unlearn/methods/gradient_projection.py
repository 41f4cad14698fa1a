"""Projection of conflicting gradients: where, in a tensor, the gradients of the two terms point against each other,
each is freed of its part along the other and given its length back; then they are added.

    g = r + alpha · f                                     where <f, r> >= 0
    g = |r| · p(r, f) / |p(r, f)| + alpha · |f| · p(f, r) / |p(f, r)|   else,   p(a, b) = a - <a, b> b / |b|²
"""

from collections.abc import Callable

import torch

from unlearn.methods.base import Gradients
from unlearn.methods.encoder_l2 import EncoderL2, EncoderL2Options


class GradientProjection(EncoderL2):
    """The paper's terms, their gradients freed of what works against the other, tensor by tensor; the encoder alone is
    trained."""

    name = "gradient_projection"
    options: EncoderL2Options
    gradients_apart = True
    units = 6  # two passes back

    def combine(self, gradients: Gradients, dot: Callable[[list, list], torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(gradients["retain"], gradients["forget"], strict=True)
        return [_combined(retain, forget, self.options.alpha) for retain, forget in pairs]


def _combined(retain: torch.Tensor, forget: torch.Tensor, alpha: float) -> torch.Tensor:
    against = (retain * forget).sum() < 0
    kept, lost = _freed(retain, forget), _freed(forget, retain)
    return torch.where(against, kept + alpha * lost, retain + alpha * forget)


def _freed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`one` without its part along `other`, as long as it was; zero where nothing is left."""
    rest = one - (one * other).sum() / other.square().sum().clamp_min(1e-30) * other
    return rest * one.norm() / rest.norm().clamp_min(1e-30)
