"""What a method is, and the registry of methods."""

import importlib
from typing import ClassVar, Protocol

import torch

from unlearn import config
from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.models.base import Adapter


class Generator(Protocol):
    """What a method may ask of the student and of the teacher."""

    def encode(self, inputs, view, seed): ...
    def training_loss(self, inputs, view, seed): ...
    def front_loss(self, images): ...
    def noise_like(self, inputs, generator): ...
    def fill_hole(self, inputs, noise, view): ...


class Method:
    """A loss over one micro-batch, and what it trains.

    needs_forget: the run must name a forget set; without it a method sees retain rows only.
    needs_teacher: whether the frozen original is loaded.
    needs_decoder: whether the student's decoder is on the device.
    trains_front: whether it is the front that is trained, on images; else the batch holds what the front made of them.
    """

    name: ClassVar[str]
    needs_forget: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    needs_decoder: ClassVar[bool] = False
    trains_front: ClassVar[bool] = False
    # forward units of one row (a forward is 1, a forward with backward 3), for FLOP/s
    units: ClassVar[int] = 4

    def __init__(self, settings: config.Method):
        self.settings = settings

    def check(self, model: type[Adapter]) -> None:
        """Raise ConfigError where the method or its settings make no sense for this family."""

    def sample_size(self) -> int:
        """How many training images `prepare` wants to see."""
        return 0

    def prepare(self, inputs: torch.Tensor) -> None:
        """See the inputs of about `sample_size` training images before the first step."""

    def trainable(self, model: Adapter) -> list[torch.nn.Parameter]:
        """The parameters that move."""
        return list(model.encoder.parameters())

    def loss(self, batch: Batch, student: Generator, teacher: Generator | None) -> dict[str, torch.Tensor]:
        """{"loss": scalar with gradient, and its named parts, detached}. Nothing here may wait for the device."""
        raise NotImplementedError


METHODS: dict[str, str] = {
    "encoder_l2": "unlearn.methods.encoder_l2:EncoderL2",
    "pretrain": "unlearn.methods.pretrain:Pretrain",
    "pretrain_front": "unlearn.methods.pretrain:PretrainFront",
}


def register(name: str, location: str) -> None:
    """Add a method at `package.module:Class`. A name twice is an error."""
    if name in METHODS:
        raise ConfigError(f"method {name} is registered already, at {METHODS[name]}")
    METHODS[name] = location


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError for an unknown one."""
    if name not in METHODS:
        raise ConfigError(f"method.name: no method {name!r}; known: {', '.join(METHODS)}")
    module, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def create(settings: config.Method) -> Method:
    """The method of a config."""
    return method_class(settings.name)(settings)
