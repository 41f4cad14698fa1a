"""The networks of diffusers that the family `diffusion` knows: what splits each, and which can fill in holes."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

import unlearn.torchvision_cpu  # noqa: F401  diffusers imports torchvision
from unlearn.models import folders
from unlearn.models.base import CheckpointedModule
from unlearn.models.diffusion import autoencoder

import diffusers  # isort: skip

PIXEL_UNET, LATENT_UNET, TRANSFORMER = "UNet2DModel", "UNet2DConditionModel", "FluxTransformer2DModel"
# The buffers of `shared` that hold the prompt's embedding: in diffusers they are no part of the model, but given with
# every call.
PROMPT_TENSORS: tuple[str, ...] = ("shared.prompt", "shared.pooled")


class Network(NamedTuple):
    """What must be known of one of diffusers' classes.

    file: the module here that splits it. folder: where a pipeline keeps it.
    channels: from an autoencoder's (C, f) to the channels that the network takes and returns; C latent channels, f
        pixels along a latent's side.
    halvings: from the network's config to how often it halves a side.
    options: the DiffusionOptions that `split` needs besides the config.
    """

    file: str
    folder: str
    channels: Callable[[int, int], tuple[int, int]]
    halvings: Callable[[dict], int]
    options: tuple[str, ...] = ()


def _halvings(config: dict[str, Any]) -> int:
    return len(config.get("block_out_channels", (0,) * 4)) - 1


NETWORKS = {
    PIXEL_UNET: Network("unlearn.models.diffusion.unet", "unet", lambda c, f: (2 * c, c), _halvings),
    LATENT_UNET: Network(
        "unlearn.models.diffusion.unet_condition", "unet", lambda c, f: (2 * c + 1, c), _halvings,
        ("tokens", "image_size", "texts"),
    ),
    TRANSFORMER: Network(
        "unlearn.models.diffusion.flux", "transformer", lambda c, f: (4 * (2 * c + f * f), 4 * c), lambda config: 1,
        ("tokens", "encoder_blocks", "texts"),
    ),
}  # fmt: skip
LATENT_NETWORKS = (LATENT_UNET, TRANSFORMER)


def module(kind: str) -> ModuleType:
    """The file that splits networks of this class: Encoder, Decoder, Conditioning, layout, split, from_public,
    to_public."""
    return importlib.import_module(NETWORKS[kind].file)


def arguments(network: dict[str, Any]) -> dict[str, Any]:
    """The config of a network without our key `class`."""
    return {name: value for name, value in network.items() if name != "class"}


def split(network: dict[str, Any], options: Any) -> tuple[CheckpointedModule, nn.Module, nn.Module]:
    """(encoder, decoder, shared) of a network. options: DiffusionOptions, of which it uses its `Network.options`."""
    kind = network["class"]
    return module(kind).split(arguments(network), **{name: getattr(options, name) for name in NETWORKS[kind].options})


def described(folder: Path) -> dict[str, Any]:
    """The class and the config of the model in a folder of diffusers. Raises WeightsError.

    Keys that the class does not take are left out, as diffusers does: those of a moving average, of other versions.
    """
    config = folders.config(folder / "config.json")
    kind, settings = config.get("_class_name"), folders.public(config)
    cls = getattr(diffusers, str(kind), None)
    known = inspect.signature(cls.__init__).parameters if cls else settings
    return {"class": kind, **{name: value for name, value in settings.items() if name in known}}


def mismatch(network: dict[str, Any], vae: dict[str, Any] | None) -> str | None:
    """Why this network cannot fill in holes here, or None. Raises ValueError where the autoencoder is unknown."""
    if (kind := network.get("class")) not in NETWORKS:
        return f"network.class {kind!r} is not known; known: {', '.join(NETWORKS)}"
    if (vae is None) == (kind in LATENT_NETWORKS):
        return f"a {kind} works on " + ("latents: say in `vae` whose" if vae is None else "pixels: leave `vae` out")
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    channels = tuple(network.get(name, parameters[name].default) for name in ("in_channels", "out_channels"))
    needed = NETWORKS[kind].channels(*autoencoder.noised_space(vae))
    if channels not in (needed, (needed[0], None)):
        return (
            f"the {kind} takes {channels[0]} channels and gives {channels[1]}: one that fills in holes takes "
            f"{needed[0]} and gives {needed[1]}"
        )
    return None
