"""The contract that every method meets: the terms of its loss over one micro-batch, what it trains, its options."""

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field

from unlearn import config
from unlearn.config_parts import Share
from unlearn.data.loader import Batch
from unlearn.models.base import Adapter
from unlearn.registry import METHODS

# Terms of a loss by name, scalars with gradient; gradients of each term by name, a tensor a parameter.
Terms = dict[str, torch.Tensor]
Gradients = dict[str, list[torch.Tensor]]


class ForgetOptions(config.Method):
    """Of every method that forgets."""

    saliency: Share | None = Field(
        default=None,
        gt=0,
        description="share of the trained weights that move at all, as 0.5: those with the largest gradient of the "
        "forget term before the first step (SalUn); none = all",
    )


class AlphaOptions(ForgetOptions):
    """Of a method whose loss is retain + alpha x forget."""

    alpha: float = Field(default=0.25, ge=0, allow_inf_nan=False, description="weight of the forget term")


class Method:
    """Subclasses state what they need, and the terms of their loss.

    Options: the keys of `method` in a configuration besides `name`, typed and explained. needs_forget: the run must
    name a forget set; without it a method sees retain rows only. needs_teacher: whether the frozen original is loaded.
    needs_decoder: whether the student's decoder is on the device. trains_first_stage: whether it is the first stage
    that is trained, on images; else the batch holds what it made of them. gradients_apart: whether the gradient of each
    term is wanted on its own, see `combine`. observes: whether it wants to know the terms of every step, see `observe`.
    loss_options: the options that change nothing of what the teacher is shown; runs that differ in these alone share
    what it makes of a micro-batch, so its inputs may depend on the micro-batch and the other options, on nothing else.
    """

    name: ClassVar[str]
    Options: ClassVar[type[config.Method]] = config.Method
    needs_forget: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    needs_decoder: ClassVar[bool] = False
    trains_first_stage: ClassVar[bool] = False
    gradients_apart: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    loss_options: ClassVar[tuple[str, ...]] = ("alpha", "saliency", "distance")
    # forward units of one row (a forward is 1, a forward with backward 3), for FLOP/s: of the encoder, or of the whole
    # model where the decoder is needed
    units: ClassVar[float] = 4

    def __init__(self, options: config.Method):
        self.options = options

    def check(self, model: type[Adapter]) -> None:
        """Raise ConfigError where the method or its options make no sense for this family."""

    def sample_size(self) -> int:
        """How many training images `prepare` wants to see."""
        return 0

    def prepare(self, inputs: torch.Tensor) -> None:
        """See the inputs of about `sample_size` training images before the first step."""

    def restarts(self, steps: int) -> tuple[int, ...]:
        """The steps of a run of so many behind which weights and optimizer are put back to where the run began, and the
        learning rate begins anew. What the method remembers stays. Raises ConfigError where the run is too short."""
        return ()

    def at(self, step: int, steps: int) -> None:
        """Called before step `step` (from 1) of a run of `steps`."""

    def observe(self, values: Terms) -> None:
        """For `observes`: the means of the terms over the global batch of the step, on the device and the same on every
        rank.

        Called when they are all computed: before `combine`, and without `gradients_apart` behind the update.
        """

    def doubt(self, row: dict) -> str | None:
        """What is to be told of a run whose last row in metrics.jsonl is this one, where it has not come to what the
        method is for."""
        return None

    def trainable(self, model: Adapter) -> list[torch.nn.Parameter]:
        """The parameters that move."""
        return [p for p in model.encoder.parameters() if p.requires_grad]

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        """The terms of the loss of one micro-batch. Nothing here may wait for the device."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """The weight of each term in the loss; 1 where none is named."""
        return {}

    def loss(self, terms: Terms) -> torch.Tensor:
        """The weighted sum of the terms."""
        weights = self.weights()
        first, *others = (terms[name] * weights.get(name, 1.0) for name in terms)
        return sum(others, start=first)

    def combine(self, gradients: Gradients, dot: Callable[[list, list], torch.Tensor]) -> list[torch.Tensor]:
        """For `gradients_apart`: the gradient that is stepped with, of those of each term over the whole global batch.

        gradients: float32, a list in the same order for each term; `weights` are not applied. What comes back is
        clipped like any other. dot: the inner product of two such lists over all parameters, a scalar on the device.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the method must remember between steps, the same on every rank; it is kept in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `state_dict` gave, perhaps on another device; it was before the first step, or is of the step it
        goes on from."""


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError for an unknown one."""
    return METHODS.load(name)


def create(options: config.Method) -> Method:
    """The method of a configuration."""
    return method_class(options.name)(options)
