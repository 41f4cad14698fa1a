"""Variational autoencoders in two halves: the first stage, which makes a diffusion model's latents, and their decoder.

Shapes: B images of S x S pixels in [-1, 1], C latent channels, h = S / f latents a side. Known are diffusers'
AutoencoderKL (Stable Diffusion, SDXL, Flux), its AutoencoderTiny, and TAEF2, the tiny autoencoder of FLUX.2. Both
halves are frozen.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unlearn.torchvision_cpu  # noqa: F401  diffusers imports torchvision
from unlearn.errors import WeightsError
from unlearn.models import folders, tensor_files
from unlearn.views import View

import diffusers  # isort: skip

# Beginnings of names in a public autoencoder -> the names in our model that replace them.
AUTOENCODER_NAMES = {
    "encoder.": "first_stage.encoder.", "quant_conv.": "first_stage.quant_conv.",
    "decoder.": "decoder.back.decoder.", "post_quant_conv.": "decoder.back.post_quant_conv.",
}  # fmt: skip
# The names of all our tensors that an autoencoder fills begin with one of these.
AUTOENCODER_TENSORS = ("first_stage.", "decoder.back.")
TAEF2_FILES = {half: f"taef2_{half}.safetensors" for half in ("encoder", "decoder")}
# 1 / the standard deviation of TAEF2's latents of 200 SUN photographs at 128 px, over all channels (of single channels
# it is 0.61 to 1.05); their mean is 0.06.
TAEF2_SCALE = 1 / 0.853


class Residual(nn.Module):
    """Three convolutions and a shortcut around them; a `pooled` block first adds the output of a wide 1 x 1 branch."""

    def __init__(self, width: int, pooled: bool):
        super().__init__()
        layers = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        first, second, third = layers
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.pool = None
        if pooled:
            narrow, wide = nn.Conv2d(4 * width, width, 1, bias=False), nn.Conv2d(width, 4 * width, 1, bias=False)
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 4 * width), nn.ReLU(), narrow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(x + self.conv(x))


class Clamp(nn.Module):
    """A smooth clamp of latents to +-3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class TAEF2(nn.Module):
    """The tiny autoencoder of FLUX.2's VAE (github.com/madebyollin/taesd, MIT): pixels in [0, 1], f = 8, C = 32."""

    def __init__(self, latent_channels: int = 32, width: int = 64, scaling_factor: float = TAEF2_SCALE):
        super().__init__()
        self.config = {"latent_channels": latent_channels, "scaling_factor": scaling_factor}

        def blocks(count: int, pooled: bool = False) -> list[nn.Module]:
            return [Residual(width, pooled) for _ in range(count)]

        def conv(inside: int, outside: int, **options) -> nn.Conv2d:
            return nn.Conv2d(inside, outside, 3, padding=1, **options)

        def down() -> nn.Module:
            return conv(width, width, stride=2, bias=False)

        def up() -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]

        self.encoder = nn.Sequential(
            conv(3, width), *blocks(1), down(), *blocks(3), down(), *blocks(3), down(), *blocks(3, True),
            conv(width, latent_channels),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            Clamp(), conv(latent_channels, width), nn.ReLU(), *blocks(3, True), *up(), *blocks(3), *up(), *blocks(3),
            *up(), *blocks(1), conv(width, 3),
        )  # fmt: skip


class Scaling(nn.Module):
    """An autoencoder's latents to latents of about unit variance; and the inverse."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        factor, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        mean, std = config.get("latents_mean") or [shift], config.get("latents_std") or [1.0]
        for name, values in (("mean", mean), ("scale", [factor / s for s in std])):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - self.mean.to(latents.dtype)) * self.scale.to(latents.dtype)

    def inverse(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.scale.to(latents.dtype) + self.mean.to(latents.dtype)


Autoencoder = diffusers.AutoencoderKL | diffusers.AutoencoderTiny | TAEF2
AUTOENCODERS: dict[str, type[Autoencoder]] = {
    "AutoencoderKL": diffusers.AutoencoderKL, "AutoencoderTiny": diffusers.AutoencoderTiny, "TAEF2": TAEF2,
}  # fmt: skip


class FirstStage(nn.Module):
    """(normalised images, view) to the latents of [the images, the images with a grey hole], (B, 2 C, h, w) float32.

    They are the means of the latents' distribution, not samples. The first half depends on what the hole hides.
    """

    def __init__(self, whole: Autoencoder):
        super().__init__()
        self.encoder, self.quant_conv = whole.encoder, getattr(whole, "quant_conv", None)
        self.kind, self.scaling = type(whole), Scaling(whole.config)
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def forward(self, images: torch.Tensor, view: View) -> torch.Tensor:
        grey = torch.where(view.pixel_mask(images.shape[-1]), 0, images)
        return torch.cat([self._image_latents(images), self.latents(grey)], dim=1)

    def _image_latents(self, images: torch.Tensor) -> torch.Tensor:
        """The latents of whole images, kept: the latent cache asks for the same images under each of its views."""
        if images.is_inference():  # such a tensor has no version that would show a change
            return self.latents(images)
        if self._last is None or self._last[0] is not images or self._last[1] != images._version:
            self._last = images, images._version, self.latents(images)
        return self._last[2]

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) to (B, C, h, w)."""
        latents = self.encoder((images.float() + 1) / 2 if self.kind is TAEF2 else images.float())
        latents = latents if self.quant_conv is None else self.quant_conv(latents)
        # An AutoencoderKL gives mean and log variance.
        return self.scaling(latents.chunk(2, dim=1)[0] if self.kind is diffusers.AutoencoderKL else latents)


class LatentDecoder(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, S, S)."""

    def __init__(self, whole: Autoencoder):
        super().__init__()
        self.decoder, self.post_quant_conv = whole.decoder, getattr(whole, "post_quant_conv", None)
        self.kind, self.scaling = type(whole), Scaling(whole.config)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        latents = self.scaling.inverse(latents).to(next(self.decoder.parameters()).dtype)
        latents = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        images = self.decoder(latents)
        return images * 2 - 1 if self.kind is TAEF2 else images


def whole(config: dict[str, Any]) -> Autoencoder:
    """The autoencoder of a config: its `class` and that class's own settings. Raises ValueError."""
    kind = config.get("class")
    if kind not in AUTOENCODERS:
        raise ValueError(f"vae.class {kind!r} is not known; known: {', '.join(AUTOENCODERS)}")
    settings = {name: value for name, value in config.items() if name != "class"}
    if kind == "AutoencoderTiny":  # diffusers saves this key with it, but does not take it
        settings.pop("block_out_channels", None)
    return AUTOENCODERS[kind](**settings)


def split(config: dict[str, Any]) -> tuple[FirstStage, LatentDecoder]:
    """The frozen halves of the autoencoder of a config. Raises ValueError."""
    autoencoder = whole(config)
    return FirstStage(autoencoder).requires_grad_(False), LatentDecoder(autoencoder).requires_grad_(False)


def noised_space(config: dict[str, Any] | None) -> tuple[int, int]:
    """(C, f): the channels that noise is added to, and the pixels along a side of each of their values.

    Raises ValueError. config: of the autoencoder; None: a model on pixels.
    """
    return (3, 1) if config is None else _latent_space(json.dumps(config, sort_keys=True))


@functools.cache
def _latent_space(config: str) -> tuple[int, int]:
    try:
        with torch.device("meta"):
            first_stage, _ = split(json.loads(config))
            latents = first_stage.latents(torch.empty(1, 3, 64, 64))
    except (TypeError, AttributeError) as e:
        raise ValueError(f"vae: diffusers cannot build it: {e}") from None
    return latents.shape[1], 64 // latents.shape[2]


def from_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An autoencoder's own names to ours; unknown names are kept, so that filling the model reports them."""
    ours = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in AUTOENCODER_NAMES if name.startswith(p)), None)
        ours[AUTOENCODER_NAMES[prefix] + name.removeprefix(prefix) if prefix else name] = tensor
    return ours


def to_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of our tensors that are the autoencoder's, with its own names."""
    return {
        theirs + n.removeprefix(ours): t
        for n, t in tensors.items() for theirs, ours in AUTOENCODER_NAMES.items() if n.startswith(ours)
    }  # fmt: skip


def first_stage_from(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of both halves, in our names, from a local folder: of a pipeline or an autoencoder of diffusers, or with
    TAEF2's two files; or from one file, by diffusers' names or those of Stable Diffusion's code. Raises WeightsError.
    """
    if path.is_file():
        return from_public(_by_their_names(tensor_files.read(path, str(path))[0]))
    halves = {half: path / name for half, name in TAEF2_FILES.items()}
    if any(file.is_file() for file in halves.values()):
        missing = [file.name for file in halves.values() if not file.is_file()]
        if missing:
            raise WeightsError(f"{path} lacks {missing[0]}: both halves of TAEF2 are needed")
        tensors = {
            f"{half}.{n}": t for half, file in halves.items() for n, t in tensor_files.load(file, str(file)).items()
        }
        return from_public(tensors)
    home = path / "vae" if (path / "model_index.json").is_file() else path
    if not (home / "config.json").is_file():
        raise WeightsError(
            f"{path} holds no autoencoder: give a folder of diffusers with a vae, or one with "
            + " and ".join(TAEF2_FILES.values())
        )
    return from_public(folders.tensors(home))


def _by_their_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an autoencoder, or of a whole file of Stable Diffusion's code, by diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = {match[1] for name in tensors if (match := re.search(r"(?:^|\.)encoder\.down\.(\d+)\.", name))}
    kinds = [""] * len(levels)
    return (
        convert_ldm_vae_checkpoint(tensors, {"down_block_types": kinds, "up_block_types": kinds}) if levels else tensors
    )
