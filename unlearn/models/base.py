"""The contract that every family of generators meets, and the registry of families.

A family is one file with one Adapter, and one line in MODELS.
"""

import functools
import importlib
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from unlearn import config
from unlearn.errors import ConfigError
from unlearn.views import View

# What the encoder hands to the decoder: one tensor, or one a level.
Embedding = torch.Tensor | list[torch.Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Options(BaseModel):
    """The shape of a model: what is needed to build it before its weights are loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class Adapter(nn.Module):
    """h = D after E. Subclasses set `encoder` and `decoder`, two modules that share no parameter.

    Images are (B, 3, S, S). "Normalised" means what the encoder takes: (pixel / 255 - mean) / std.
    A parameter may only be used inside the forward of the module that owns it: under ZeRO-3 it is empty elsewhere.
    """

    family: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    # False where hidden pixels never enter the encoder, so that noise in the hole would change nothing.
    encoder_sees_hole: ClassVar[bool] = True

    encoder: nn.Module
    decoder: nn.Module | None

    def __init__(self, options: Options):
        super().__init__()
        self.options = options

    @property
    def grid(self) -> int:
        """Patches along one side of the image, the unit of views."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor, view: View) -> Embedding:
        """Embedding of normalised images under a view; the subclass states the shapes."""
        raise NotImplementedError

    def reconstruct(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """Normalised images with the hidden patches filled in and the visible ones as they were, (B, 3, S, S)."""
        raise NotImplementedError

    def training_loss(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """The loss the family is pretrained with, a scalar."""
        raise NotImplementedError

    def flops(self, view: View) -> int:
        """FLOPs (2 a multiply-add) of one encoder forward of one image under this view."""
        raise NotImplementedError

    @classmethod
    def from_public(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the tensors of a public checkpoint to ours; tensors that carry our names are handed back as they are."""
        return tensors

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) to what the encoder takes, in float32."""
        mean, std = _statistics(self.options.mean, self.options.std, pixels.device)
        return (pixels.float() / 255 - mean) / std

    def denormalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images to float32 pixels in [0, 1]."""
        mean, std = _statistics(self.options.mean, self.options.std, images.device)
        return (images.float() * std + mean).clamp(0, 1)

    def noise_like(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Standard Gaussian noise in the shape of `images`."""
        return torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)

    def drop_decoder(self) -> None:
        """Forget the decoder, for methods that never call it: it then takes no memory on the device."""
        self.decoder = None


@functools.cache
def _statistics(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel statistics (1, 3, 1, 1) on a device, in float32 whatever the model's dtype; copied there once."""
    return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))


# family -> where its Adapter is; imported when first used
MODELS: dict[str, str] = {
    "mae": "unlearn.models.mae:MaskedAutoencoder",
}


def register(family: str, location: str) -> None:
    """Add a family at `package.module:Class`. A name twice is an error."""
    if family in MODELS:
        raise ConfigError(f"model family {family} is registered already, at {MODELS[family]}")
    MODELS[family] = location


def adapter(family: str) -> type[Adapter]:
    """The Adapter class of a family. Raises ConfigError for an unknown one."""
    if family not in MODELS:
        raise ConfigError(f"model.family: no family {family!r}; known: {', '.join(MODELS)}")
    module, _, name = MODELS[family].partition(":")
    return getattr(importlib.import_module(module), name)


def options(model: config.Model, found: dict[str, Any] | None = None) -> Options:
    """The shape that a config asks for: the variant's values, or those `found` beside the weights, then `options`."""
    cls = adapter(model.family)
    if model.variant and model.variant not in cls.variants:
        raise ConfigError(f"model.variant: {model.family} has no variant {model.variant!r}; known: {', '.join(cls.variants)}")
    values = dict(cls.variants[model.variant]) if model.variant else dict(found or {})
    try:
        return cls.Options.model_validate(values | model.options)
    except ValidationError as e:
        error = e.errors()[0]
        raise ConfigError(f"model.options.{'.'.join(map(str, error['loc']))}: {error['msg'].removeprefix('Value error, ')}") from None
