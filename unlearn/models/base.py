"""The contract that every family of generators meets. A family is one file with one Adapter, and one line in MODELS.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unlearn import config
from unlearn.errors import ConfigError, WeightsError
from unlearn.registry import MODELS
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
    """h = D after E. Subclasses set `encoder` and `decoder`, two modules that share no parameter, and where they need them

    shared: what encoder and decoder both use (the embedding of time): never trained, or the decoder would move with it.
    first stage: turns images into what the encoder takes, called as first_stage(images, view): a tokenizer, a VAE; never trained.

    Images are (B, 3, S, S); "normalised" means (pixel / 255 - mean) / std. "Inputs" are what the encoder takes: one tensor
    with a row an image, normalised images where there is no first_stage. Whatever is random in a forward comes from `seed`: the
    same seed gives teacher and student the same. A parameter may only be used inside the forward of the module that owns
    it: under ZeRO-3 it is empty elsewhere.
    """

    family: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    # False where hidden pixels never enter the encoder, so that noise in the hole would change nothing.
    encoder_sees_hole: ClassVar[bool] = True
    # False where inputs are tokens, so that noise has no mean and covariance.
    continuous: ClassVar[bool] = True
    # Where the teacher's input is noise unless the config says so: "image" or "hole".
    noise_region: ClassVar[str] = "image"
    # Beginnings of the names of the tensors that `model.first_stage` fills, all of them.
    first_stage_names: ClassVar[tuple[str, ...]] = ("first_stage.",)

    encoder: nn.Module
    decoder: nn.Module | None

    def __init__(self, options: Options):
        super().__init__()
        self.options = options
        self.shared: nn.Module | None = None
        self.first_stage: nn.Module | None = None

    @property
    def grid(self) -> int:
        """Patches along one side of the image, the unit of views."""
        raise NotImplementedError

    def inputs(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """What the encoder takes of normalised images under a view."""
        return images if self.first_stage is None else self.first_stage(images, view)

    def encode(self, inputs: torch.Tensor, view: View, seed: int = 0) -> Embedding:
        """Embedding of inputs under a view; the subclass states the shapes."""
        raise NotImplementedError

    def reconstruct(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """Normalised images with the hidden patches filled in and the visible ones as they were, (B, 3, S, S)."""
        raise NotImplementedError

    def training_loss(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """The loss the family is pretrained with, a scalar."""
        raise NotImplementedError

    def first_stage_loss(self, images: torch.Tensor) -> torch.Tensor:
        """The loss that the first stage is trained with, a scalar, for families whose first stage can be trained here."""
        raise NotImplementedError

    def flops(self, view: View) -> int:
        """FLOPs (2 a multiply-add) of one encoder forward of one image under this view."""
        raise NotImplementedError

    def first_stage_parameters(self) -> list[nn.Parameter]:
        """What `first_stage_loss` trains, all of it set to require a gradient."""
        raise NotImplementedError

    @classmethod
    def from_public(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the tensors of a public checkpoint to ours; tensors that carry our names are handed back as they are."""
        return tensors

    @classmethod
    def from_folder(cls, folder: Path, chosen: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors in our names, options) of a folder as other libraries save it: a local path. Raises WeightsError.

        chosen: the options that the config sets itself; they win over those of the folder afterwards.
        """
        raise WeightsError(f"{folder}: family {cls.family} knows no such folder; give one with model.json, or a file")

    @classmethod
    def folder_options(cls, folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
        """The options that `from_folder` finds; here the files of tensors may be missing. Raises WeightsError."""
        raise WeightsError(f"{folder}: family {cls.family} knows no such folder; give one with model.json, or a file")

    @classmethod
    def placed(cls, tensors: dict[str, torch.Tensor], options: Options) -> dict[str, torch.Tensor]:
        """Tensors in our names, on the side where these options have them: for families that let the config say where the
        encoder ends."""
        return tensors

    @classmethod
    def first_stage_from(cls, path: Path) -> dict[str, torch.Tensor]:
        """Tensors of the first stage, and of what undoes it in the decoder, from a public file or folder: a local path.

        They are named as in the model's `state_dict()`. Raises WeightsError.
        """
        raise WeightsError(f"model.first_stage: family {cls.family} has no frozen first stage")

    def to_folder(self, folder: Path) -> None:
        """Write the model as the libraries it comes from read it. Raises WeightsError where there is no such form."""
        raise WeightsError(f"family {self.family} has no other form than ours")

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) to what the encoder takes, in float32."""
        mean, std = _statistics(self.options.mean, self.options.std, pixels.device)
        return (pixels.float() / 255 - mean) / std

    def denormalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images to float32 pixels in [0, 1]."""
        mean, std = _statistics(self.options.mean, self.options.std, images.device)
        return (images.float() * std + mean).clamp(0, 1)

    def noise_like(self, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Inputs of standard Gaussian noise, in the shape of `inputs`."""
        return torch.randn(inputs.shape, generator=generator, device=inputs.device, dtype=inputs.dtype)

    def fill_hole(self, inputs: torch.Tensor, noise: torch.Tensor, view: View) -> torch.Tensor:
        """The inputs, with those of noise in the hole."""
        return torch.where(view.pixel_mask(inputs.shape[-1]), noise, inputs)

    def drop_decoder(self) -> None:
        """Forget the decoder, for methods that never call it: it then takes no memory on the device."""
        self.decoder = None

    def take_first_stage(self, device: torch.device) -> nn.Module | None:
        """Hand out the first stage, on its device, and forget it: it is no part of what is trained, sharded or saved."""
        first_stage, self.first_stage = self.first_stage, None
        return first_stage if first_stage is None else first_stage.to(device).requires_grad_(False).eval()

    def stock_noise(self, first_stage: nn.Module, seed: int) -> None:
        """Called with the first stage before training: a family whose noise has to go through it makes a stock here."""


def counted(forward: Callable[[], object]) -> int:
    """FLOPs (2 a multiply-add) of a call, as torch counts them; modules and inputs on the meta device cost nothing."""
    # Attention is counted only where it is made of plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


@functools.cache
def _statistics(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel statistics (1, 3, 1, 1) on a device, in float32 whatever the model's dtype; copied there once."""
    return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))


def _differ(named: Any, found: Any) -> bool:
    """Whether two values of an option contradict each other; a config that is found may say more than the one that is named."""
    if isinstance(named, dict) and isinstance(found, dict):
        return any(_differ(value, found[key]) for key, value in named.items() if key in found)
    if isinstance(named, list | tuple) and isinstance(found, list | tuple):
        return len(named) != len(found) or any(map(_differ, named, found))
    return named != found


def adapter(family: str) -> type[Adapter]:
    """The Adapter class of a family. Raises ConfigError for an unknown one."""
    return MODELS.load(family)


def shape(family: str, variant: str) -> Adapter:
    """A named shape without weights: its parameters are on the meta device."""
    with torch.device("meta"):
        return adapter(family)(options(config.Model(family=family, variant=variant)))


def options(model: config.Model, found: dict[str, Any] | None = None) -> Options:
    """The shape that a config asks for: the variant's values and those `found` beside the weights, which must agree, then `options`."""
    cls, found = adapter(model.family), found or {}
    if model.variant and model.variant not in cls.variants:
        raise ConfigError(f"model.variant: {model.family} has no variant {model.variant!r}; known: {', '.join(cls.variants)}")
    named = dict(cls.variants[model.variant]) if model.variant else {}
    for key in named.keys() & found.keys() - model.options.keys():
        if _differ(named[key], found[key]):
            raise ConfigError(f"model.variant {model.variant} has another {key} than {model.weights} was made with: leave model.variant out")
    values = named | found
    try:
        return cls.Options.model_validate(values | model.options)
    except ValidationError as e:
        error = e.errors()[0]
        raise ConfigError(f"model.options.{'.'.join(map(str, error['loc']))}: {error['msg'].removeprefix('Value error, ')}") from None
