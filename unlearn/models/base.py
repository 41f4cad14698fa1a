"""The contract that every family of generators meets: one file with one Adapter, and one line in registry.MODELS."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from unlearn import config
from unlearn.errors import ConfigError, WeightsError
from unlearn.registry import MODELS
from unlearn.views import View

logger = logging.getLogger(__name__)

# What the encoder hands to the decoder: one tensor, or one for each level.
Embedding = torch.Tensor | list[torch.Tensor]

LARGEST = 1 << 24  # number in the options of a model
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ModelOptions(BaseModel):
    """The shape of a model: what must be known to build it before its weights are loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class CheckpointedModule(nn.Module):
    """A module of many blocks that can save memory by activation checkpointing; every encoder is one.

    activation_checkpointing: drop the activations inside a block after its forward pass, and compute them again in the
    backward pass.
    """

    activation_checkpointing = False

    def checkpointed(self, block: nn.Module, *inputs: Any) -> Any:
        """block(*inputs), with activation checkpointing where that is set and a gradient is wanted."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class Adapter(nn.Module):
    """A generator D(E(x)). Subclasses set `encoder` (E) and `decoder` (D), which share no parameter, and where needed

    shared: what encoder and decoder both use (the embedding of time). Never trained, or the decoder would change too.
    first_stage: turns images into what the encoder takes, called as first_stage(images, view): a tokenizer, a VAE.
        Never trained together with the encoder.

    Images are (B, 3, S, S); "normalised" means (pixel / 255 - mean) / std. "Inputs" are what the encoder takes, one row
    for each image: normalised images where there is no first stage. Everything random in a forward pass comes from its
    `seed`, so that teacher and student draw the same. A parameter may only be used inside the forward of the module
    that owns it: under ZeRO-3 it is empty at any other time.
    """

    family: ClassVar[str]
    Options: ClassVar[type[ModelOptions]] = ModelOptions
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    # False where hidden pixels never enter the encoder, so that noise in the hole would change nothing.
    encoder_sees_hole: ClassVar[bool] = True
    # False where inputs are tokens, so that noise has no mean and covariance.
    continuous: ClassVar[bool] = True
    # Where the teacher's input is noise unless the config sets it: "image" or "hole".
    noise_region: ClassVar[str] = "image"
    # The names of all tensors that `model.first_stage` fills begin with one of these.
    first_stage_names: ClassVar[tuple[str, ...]] = ("first_stage.",)
    # Patterns of the names of the files that `options_from_folder` reads.
    option_files: ClassVar[tuple[str, ...]] = ("*.json",)

    # Subclasses annotate their own classes; decoder and first_stage are None once they were dropped.
    options: ModelOptions
    encoder: CheckpointedModule
    decoder: nn.Module | None
    shared: nn.Module | None
    first_stage: nn.Module | None
    # the type of most of the numbers of the weights that it was built from
    stored: torch.dtype = torch.float32

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.options = options
        self.shared = None
        self.first_stage = None

    @property
    def grid(self) -> int:
        """Patches along one side of the image, the unit of views."""
        raise NotImplementedError

    def inputs(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """What the encoder takes, computed from normalised images under a view."""
        return images if self.first_stage is None else self.first_stage(images, view)

    def encode(self, inputs: torch.Tensor, view: View, seed: int = 0) -> Embedding:
        """Embedding of inputs under a view; the subclass states the shapes."""
        raise NotImplementedError

    def reconstruct(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """Normalised images with the hidden patches filled in and the visible ones unchanged, (B, 3, S, S)."""
        raise NotImplementedError

    def predict(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """What the decoder makes of the inputs in a pass of training, (B, ...)."""
        raise NotImplementedError

    def targets(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """What `predict` should give, a row for each row."""
        raise NotImplementedError

    def loss(self, predictions: torch.Tensor, targets: torch.Tensor, view: View) -> torch.Tensor:
        """The loss the family is pretrained with, a scalar: of rows of `predict` and `targets`, and of the view of
        these rows."""
        raise NotImplementedError

    def difference(self, one: torch.Tensor, other: torch.Tensor, view: View) -> torch.Tensor:
        """Mean squared difference of two predictions, of what counts in the loss, a scalar in float32 or better."""
        return (one.to(torch.promote_types(one.dtype, torch.float32)) - other).square().mean()

    def training_loss(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """The same of a whole batch of inputs."""
        return self.loss(self.predict(inputs, view, seed), self.targets(inputs, view, seed), view)

    def first_stage_loss(self, images: torch.Tensor) -> torch.Tensor:
        """The loss of the first stage, a scalar; only of families whose first stage can be trained here."""
        raise NotImplementedError

    def flops(self, view: View) -> int:
        """FLOPs (a multiply-add is 2) of one encoder forward of one image under this view."""
        raise NotImplementedError

    def first_stage_parameters(self) -> list[nn.Parameter]:
        """The parameters that `first_stage_loss` trains, all of them set to require a gradient."""
        raise NotImplementedError

    @classmethod
    def from_public(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a public checkpoint with our names; those that have our names already stay as they are."""
        return tensors

    @classmethod
    def from_file(
        cls, tensors: dict[str, torch.Tensor], arguments: dict[str, Any], chosen: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """(tensors in our names, the options that they tell or None) of a public checkpoint in one file.

        Raises WeightsError. arguments: of the program that wrote it, where the file says them. chosen: the options that
        the config sets itself.
        """
        return cls.from_public(tensors), None

    @classmethod
    def from_folder(
        cls, folder: Path, chosen: dict[str, Any], first_stage: Path | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors in our names, options) of a local folder as another library saves it. Raises WeightsError.

        chosen: the options that the config sets itself; they take precedence over those of the folder afterwards.
        first_stage: where `model.first_stage` is; a family may find there what the folder lacks.
        """
        raise cls._no_folder(folder)

    @classmethod
    def options_from_folder(
        cls, folder: Path, chosen: dict[str, Any], first_stage: Path | None = None
    ) -> dict[str, Any]:
        """The options that `from_folder` gives, without reading a model's tensors. Raises WeightsError.

        Of the folder only the files that match `option_files` are needed.
        """
        raise cls._no_folder(folder)

    @classmethod
    def _no_folder(cls, folder: Path) -> WeightsError:
        return WeightsError(f"{folder}: family {cls.family} knows no such folder; give one with model.json, or a file")

    @classmethod
    def placed(cls, tensors: dict[str, torch.Tensor], options: ModelOptions) -> dict[str, torch.Tensor]:
        """Tensors in our names, moved between encoder and decoder as these options split them: for families whose
        options say where the encoder ends."""
        return tensors

    @classmethod
    def first_stage_from(cls, path: Path) -> dict[str, torch.Tensor]:
        """Tensors of the first stage, and of its inverse in the decoder, from a local public file or folder.

        They are named as in the model's `state_dict()`. Raises WeightsError.
        """
        raise WeightsError(f"model.first_stage: family {cls.family} has no frozen first stage")

    def to_folder(self, folder: Path, origin: Path | None = None) -> str:
        """Write the model in the format of the library it comes from; the expression that loads it there, with FOLDER
        for its place. Raises WeightsError where there is no such format.

        origin: the folder of that library that the model came from, for parts that are not ours to train.
        """
        raise WeightsError(f"family {self.family} has no other format than ours")

    def guide(self, scale: float) -> None:
        """Let `reconstruct` follow the model's prompt by this scale. Raises ConfigError where the model has none."""
        raise ConfigError(f"evaluation.guidance_scale: family {self.family} takes no prompt; leave it out")

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels (B, 3, S, S) to normalised images in float32."""
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
        """The inputs, with those of `noise` in the hole."""
        return torch.where(view.pixel_mask(inputs.shape[-1]), noise, inputs)

    def drop_decoder(self) -> None:
        """Remove the decoder, for methods that never call it: it then takes no memory on the device."""
        self.decoder = None

    def take_first_stage(self, device: torch.device) -> nn.Module | None:
        """Return the first stage, on this device, and remove it: it is not trained, sharded or saved with the model."""
        first_stage, self.first_stage = self.first_stage, None
        return first_stage if first_stage is None else first_stage.to(device).requires_grad_(False).eval()

    def stock_noise(self, first_stage: nn.Module, seed: int) -> None:
        """Called before training: a family whose noise must pass through the first stage prepares that noise here."""


@functools.cache
def tell(message: str) -> None:
    """Warn, once a process: student and teacher read the same weights."""
    logger.warning(message)


def count_flops(forward: Callable[[], object]) -> int:
    """FLOPs (a multiply-add is 2) of a call, as torch counts them; on the meta device counting costs nothing."""
    # torch counts attention only where it is computed as plain matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


@functools.cache
def _statistics(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel mean and deviation (1, 3, 1, 1) on a device, in float32 whatever the model's dtype; copied there once."""
    return torch.tensor(mean, device=device).view(1, 3, 1, 1), torch.tensor(std, device=device).view(1, 3, 1, 1)


def adapter(family: str) -> type[Adapter]:
    """The Adapter class of a family. Raises ConfigError for an unknown one."""
    return MODELS.load(family)


def options(model: config.Model, recorded: dict[str, Any] | None = None) -> ModelOptions:
    """The shape that a config asks for. Raises ConfigError.

    Later values win: the variant's, those `recorded` beside the weights, which must not contradict them, the config's.
    """
    cls, recorded = adapter(model.family), recorded or {}
    if model.variant and model.variant not in cls.variants:
        raise ConfigError(
            f"model.variant: {model.family} has no variant {model.variant!r}; known: {', '.join(cls.variants)}"
        )
    named = dict(cls.variants[model.variant]) if model.variant else {}
    for key in named.keys() & recorded.keys() - model.options.keys():
        if _contradict(named[key], recorded[key]):
            raise ConfigError(
                f"model.variant {model.variant} has another {key} than {model.weights} was made with: "
                "leave model.variant out"
            )
    if _largest(recorded) > LARGEST:  # building it would never end
        raise ConfigError(f"model.options: {model.weights} names a number above {LARGEST:,}, which no shape has")
    try:
        return cls.Options.model_validate(named | recorded | model.options)
    except ValidationError as e:
        error = e.errors()[0]
        raise ConfigError(
            f"{'.'.join(['model.options', *map(str, error['loc'])])}: {error['msg'].removeprefix('Value error, ')}"
        ) from None
    except (TypeError, ArithmeticError, LookupError, AttributeError) as e:  # a check met a value of another kind
        raise ConfigError(
            f"model.options: a value of {model.weights or model.family} is of no use here ({type(e).__name__}: {e})"
        ) from None


def _largest(value: Any) -> int:
    """The largest whole number in an option, or 0."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return max([value if isinstance(value, int) else 0, *map(_largest, parts)])


def _contradict(named: Any, recorded: Any) -> bool:
    """Whether two values of an option contradict each other; keys that only one of two dictionaries has do not."""
    if isinstance(named, dict) and isinstance(recorded, dict):
        return any(_contradict(value, recorded[key]) for key, value in named.items() if key in recorded)
    if isinstance(named, list | tuple) and isinstance(recorded, list | tuple):
        return len(named) != len(recorded) or any(map(_contradict, named, recorded))
    return named != recorded
