"""Epsilon-constrained unlearning (arXiv 2408.01689): keep as well as can be, while the forget term is brought to a
chosen level.

f1 is the paper's forget term, f2 its retain term; the level lies between the two ends of the trade-off, which the run
finds itself:

    first   g = ∇f2 + eta ∇f1,  psi = |∇f1|²               down to the least f1 there is: eps_min
    second  g = ∇f1 + eta ∇f2,  psi = |∇f2|²               the same the other way round: eps_max, f1 where f2 is kept
    then    g = ∇f2 + eta ∇f1,  psi = (f1 - eps) · |∇f1|²,  eps = eps_min + r (eps_max - eps_min)

    eta = max((psi - <∇f1, ∇f2>) / (|∇f|² + 1e-7), 0),  ∇f the gradient that it is multiplied with

Each part starts from the original weights. r means the same for every model, where alpha does not. The project follows
others' implementations of the paper.
"""

from collections.abc import Callable

import torch
from pydantic import Field

from unlearn.errors import ConfigError
from unlearn.methods.base import Gradients, Terms
from unlearn.methods.encoder_l2 import EncoderL2, TargetOptions

SMALL = 1e-7
SUM, COUNT, LEAST, MOST = range(4)  # what is remembered: of f1 at the end of a part its sum and count; eps_min, eps_max


class EpsilonOptions(TargetOptions):
    """r, and how long the ends of the trade-off are looked for."""

    r: float = Field(default=0.5, ge=0, le=1, description="degree of forgetting between its two ends, 0 the strongest")
    boundary: float = Field(
        default=0.25,
        gt=0,
        lt=0.5,
        description="share of the run's steps for each of the two ends; f1 is taken over the last quarter",
    )


class EpsilonConstrained(EncoderL2):
    """Bring the forget term to a level between the ends of the trade-off, and keep as well as that allows; the encoder
    is trained."""

    name = "epsilon_constrained"
    Options = EpsilonOptions
    options: EpsilonOptions
    gradients_apart = True
    observes = True
    loss_options = (*EncoderL2.loss_options, "r", "boundary")
    units = 6  # two passes back

    def __init__(self, options: EpsilonOptions):
        super().__init__(options)
        self.known, self.forget = torch.zeros(4), torch.zeros(())
        self._step, self._ends = 1, (1, 2)

    def restarts(self, steps: int) -> tuple[int, ...]:
        if steps < 3:
            raise ConfigError(f"training: {self.name} has three parts, and a run of {steps} steps has no room for them")
        part = max(1, int(self.options.boundary * steps))
        return part, 2 * part

    def at(self, step: int, steps: int) -> None:
        self._step, self._ends = step, self.restarts(steps)

    def observe(self, values: Terms) -> None:
        self.forget = values["forget"].float()
        self.known = known = self.known.to(self.forget.device).clone()
        first, second = self._ends
        end = first if self._step <= first else second
        if end - max(1, first // 4) < self._step <= end:
            known[SUM] += self.forget
            known[COUNT] += 1
        if self._step == end:
            known[LEAST if end == first else MOST] = known[SUM] / known[COUNT]
            known[SUM] = known[COUNT] = 0

    def combine(self, gradients: Gradients, dot: Callable[[list, list], torch.Tensor]) -> list[torch.Tensor]:
        forget, retain = gradients["forget"], gradients["retain"]
        first, second = self._ends
        if first < self._step <= second:
            return _combined(forget, retain, dot, lambda squared: squared)
        if self._step <= first:
            return _combined(retain, forget, dot, lambda squared: squared)
        level = self.known[LEAST] + self.options.r * (self.known[MOST] - self.known[LEAST])
        return _combined(retain, forget, dot, lambda squared: (self.forget - level) * squared)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"known": self.known}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.known = state["known"]


def _combined(main: list, other: list, dot: Callable[[list, list], torch.Tensor], psi: Callable) -> list[torch.Tensor]:
    """main + eta · other, psi a function of |other|²."""
    squared = dot(other, other)
    eta = ((psi(squared) - dot(main, other)) / (squared + SMALL)).clamp_min(0)
    return [a + eta * b for a, b in zip(main, other, strict=True)]
