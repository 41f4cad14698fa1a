"""Diffusion models that fill in holes: networks and schedulers of diffusers, in the space of pixels or of an autoencoder's latents.

Encoder: all that goes down, and the middle (of a transformer its first blocks); the embedding compared is every level that it
hands to the decoder. In pixel space (Palette, arXiv 2111.05826) the network sees [condition, noisy image]: the image with
Gaussian noise in its hole, and the image with y_t in its hole, y_t being what is hidden, noised. In latent space it sees y_t
of the whole image, the hole, and the latents of the image with a grey hole.
Shapes: B images of S x S pixels; C channels of h x w are noised: 3 of S x S, or an autoencoder's.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import nn

from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, folders
from unlearn.models.diffusion import autoencoder, flow, noising
from unlearn.models.diffusion.shapes import LINEAR, PALETTE, VARIANTS
from unlearn.views import View

import diffusers  # isort: skip  after noising, which makes torchvision fit


class Network(NamedTuple):
    """Where one of diffusers' classes is split. channels: (C, f) to what it takes and gives, f the pixels along a latent's
    side; halvings: how often it halves a side; own: options of ours that `split` takes besides."""

    file: str
    channels: Callable[[int, int], tuple[int, int]]
    halvings: Callable[[dict], int]
    own: tuple[str, ...] = ()


def _levels(config: dict[str, Any]) -> int:
    return len(config.get("block_out_channels", (0,) * 4)) - 1


FLUX = "FluxTransformer2DModel"
NETWORKS = {
    "UNet2DModel": Network("unlearn.models.diffusion.unet", lambda c, f: (2 * c, c), _levels),
    "UNet2DConditionModel": Network("unlearn.models.diffusion.unet_condition", lambda c, f: (2 * c + 1, c), _levels, ("tokens", "image_size")),
    FLUX: Network("unlearn.models.diffusion.flux", lambda c, f: (4 * (2 * c + f * f), 4 * c), lambda config: 1, ("tokens", "encoder_blocks")),
}


class DiffusionOptions(base.Options):
    """Defaults are those of Palette at 256 px."""

    image_size: int = 256
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    grid: PositiveInt = 16
    # "class" and the config of that class of diffusers
    network: dict[str, Any] = PALETTE
    # config of the diffusers scheduler that the model was or will be trained with
    scheduler: dict[str, Any] = LINEAR
    # "class" and the config of the autoencoder in whose latents the network works; none: it works on pixels
    vae: dict[str, Any] | None = None
    # what a network that takes a text is told, and how many tokens of it
    prompt: str = ""
    tokens: PositiveInt = 77
    # how many blocks of a transformer are the encoder; none: half of them
    encoder_blocks: PositiveInt | None = None
    # of `reconstruct`
    sampler: Literal[noising.SAMPLERS] = "DDIMScheduler"
    sampling_steps: PositiveInt = 20

    @model_validator(mode="after")
    def _fits(self):
        if wrong := _unfit(self.network, self.vae):
            raise ValueError(wrong)
        _, f = _space(self.vae)
        for parts, what in (
            (f * 2 ** NETWORKS[self.network["class"]].halvings(self.network), "what the network divides a side by"),
            (f * self.grid, f"{f} times the grid of views" if f > 1 else "the grid of views"),
        ):
            if self.image_size % parts:
                raise ValueError(f"image_size {self.image_size} is not a multiple of {parts}, {what}")
        return self


def _space(vae: dict[str, Any] | None) -> tuple[int, int]:
    """(C, f): the channels that are noised, and the pixels along a side of each of their values. Raises ValueError."""
    return (3, 1) if vae is None else _latents(json.dumps(vae, sort_keys=True))


@functools.cache
def _latents(vae: str) -> tuple[int, int]:
    try:
        return autoencoder.shape(json.loads(vae))
    except (TypeError, AttributeError) as e:
        raise ValueError(f"vae: diffusers cannot build it: {e}") from None


def _unfit(network: dict[str, Any], vae: dict[str, Any] | None) -> str | None:
    """Why this network cannot fill in holes here. Raises ValueError where the autoencoder is unknown."""
    if (kind := network.get("class")) not in NETWORKS:
        return f"network.class {kind!r} is not known; known: {', '.join(NETWORKS)}"
    if (vae is None) != (kind == "UNet2DModel"):
        return f"a {kind} works on " + ("latents: say in `vae` whose" if vae is None else "pixels: leave `vae` out")
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    found = tuple(network.get(name, known[name].default) for name in ("in_channels", "out_channels"))
    wanted = NETWORKS[kind].channels(*_space(vae))
    if found != wanted and found != (wanted[0], None):
        return f"the {kind} takes {found[0]} channels and gives {found[1]}: one that fills in holes takes {wanted[0]} and gives {wanted[1]}"
    return None


class Diffusion(base.Adapter):
    """The embedding compared is the list of all levels that the network's encoder hands to its decoder.

    Inputs are images (B, 3, S, S), or latents (B, 2 C, h, w) of the images and of the images with a grey hole. Timesteps,
    noise and the noise of the condition are drawn from the forward's seed. Rows are noised one by one.
    """

    family = "diffusion"
    Options = DiffusionOptions
    noise_region = "hole"
    first_stage_names = autoencoder.NAMES
    variants = VARIANTS

    def __init__(self, options: DiffusionOptions):
        super().__init__(options)
        try:
            self.noising = _noising(options)
            self.encoder, self.decoder, self.shared = _split(options)
            if options.vae is not None:
                self.first_stage, self.decoder.back = autoencoder.split(options.vae)
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as e:
            raise ConfigError(f"model.options: diffusers cannot build this network and scheduler: {str(e).splitlines()[0]}") from None
        if options.sampling_steps > self.noising.count:
            raise ConfigError(f"model.options.sampling_steps {options.sampling_steps} is more than the scheduler's {self.noising.count} timesteps")
        self.layout = _file(options.network["class"]).layout
        self.shared.requires_grad_(False)
        self._initialise()
        self._flops: int | None = None

    def _initialise(self):
        # It is never trained, not even from nothing: random features of time, of the size that the blocks' activations have.
        for module in self.shared.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, prompt in self.shared.named_buffers():
            if name in ("prompt", "pooled"):  # zeros would leave what attends to them without gradient
                nn.init.normal_(prompt)

    @property
    def grid(self) -> int:
        return self.options.grid

    @property
    def latent(self) -> bool:
        """Whether it works on an autoencoder's latents."""
        return self.options.vae is not None

    def encode(self, inputs: torch.Tensor, view: View, seed: int = 0) -> list[torch.Tensor]:
        sample, t, _ = self._noised(inputs, view, seed)
        return self.encoder(sample, *self.shared(t, inputs.dtype))

    def training_loss(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """Mean squared error of what the network predicts (noise, velocity or image): in the hole, or over all latents."""
        sample, t, target = self._noised(inputs, view, seed)
        error = self._predict(sample, t).to(target.dtype) - target
        if self.latent:
            return error.square().mean()
        hole = view.pixel_mask(error.shape[-1]).expand_as(error)
        return torch.where(hole, error, 0).square().sum() / hole.sum()

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """Sampled in `options.sampling_steps`, from the same noise for every image: rows do not depend on their batch."""
        hole = view.pixel_mask(images.shape[-1])
        known = torch.where(hole, 0, images)
        known = self.first_stage.latents(known) if self.latent else known
        condition, x = (n.expand_as(known) for n in _noise(known[:1], 0))
        known = known if self.latent else torch.where(hole, condition, known)
        sampler = self.noising.sampler(self.options.sampler, self.options.sampling_steps, known.device)
        for t in sampler.timesteps:
            x = sampler.step(self._predict(self.layout(x, known, hole), t.expand(len(x))), t, x).prev_sample
        filled = self.decoder.back(x) if self.latent else x
        return torch.where(hole, filled.to(images.dtype), images)

    def _noised(self, inputs: torch.Tensor, view: View, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(what the network sees, timesteps (B,), what it should say, in float32 or better)."""
        hole = view.pixel_mask(self.options.image_size)
        clean, known = inputs.chunk(2, dim=1) if self.latent else (inputs, None)
        condition, eps = _noise(clean, seed)
        known = torch.where(hole, condition, clean) if known is None else known
        t = self.noising.times(len(inputs), _generator(seed, 1, inputs.device))
        sample = self.layout(self.noising.noised(clean, eps, t), known, hole)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        return sample, t, self.noising.target(clean.to(wide), eps.to(wide), t)

    def _predict(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        emb, context = self.shared(t, sample.dtype)
        return self.decoder(self.encoder(sample, emb, context), emb, context)

    def fill_hole(self, inputs: torch.Tensor, noise: torch.Tensor, view: View) -> torch.Tensor:
        """The inputs, with noise in the hole; the latents of the image with a grey hole stay."""
        if not self.latent:
            return super().fill_hole(inputs, noise, view)
        (clean, known), noise = inputs.chunk(2, dim=1), noise.chunk(2, dim=1)[0]
        return torch.cat([super().fill_hole(clean, noise, view), known], dim=1)

    def flops(self, view: View) -> int:
        if self._flops is None:
            (channels, f), size = _space(self.options.vae), self.options.image_size
            with torch.device("meta"):
                encoder, _, shared = _split(self.options)
                noisy, t = torch.empty(1, channels, size // f, size // f), torch.zeros(1, dtype=torch.long)
                sample = self.layout(noisy, noisy, torch.empty(1, 1, size, size, dtype=torch.bool))
                self._flops = base.counted(lambda: encoder(sample, *shared(t, sample.dtype)))
        return self._flops

    @classmethod
    def from_public(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One file of diffusers' names, of any of the networks."""
        if any(name.startswith("encoder.") for name in tensors):
            return tensors
        transformer = any(name.startswith("transformer_blocks.") for name in tensors)
        return _file(FLUX if transformer else "UNet2DConditionModel").from_public(tensors)

    @classmethod
    def placed(cls, tensors: dict[str, torch.Tensor], options: DiffusionOptions) -> dict[str, torch.Tensor]:
        """Blocks of a transformer on the side of the cut where `encoder_blocks` has them."""
        if options.network["class"] != FLUX:
            return tensors
        return _file(FLUX).from_public(tensors, options.encoder_blocks)

    @classmethod
    def first_stage_from(cls, path: Path) -> dict[str, torch.Tensor]:
        """An autoencoder: a pipeline's folder or its own, of diffusers, or one with TAEF2's two files."""
        return autoencoder.first_stage_from(path)

    @classmethod
    def from_folder(cls, folder: Path, chosen: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A folder of diffusers: of a pipeline, or of a UNet2DModel alone."""
        index = folder / "model_index.json"
        if index.is_file() and "vae" in folders.config(index):
            from unlearn.models.diffusion import pipeline

            return pipeline.read(folder, chosen)
        options = cls.folder_options(folder, chosen)
        return cls.from_public(folders.tensors(folder / "unet" if index.is_file() else folder)), options

    @classmethod
    def folder_options(cls, folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
        index = folder / "model_index.json"
        if index.is_file() and "vae" in folders.config(index):
            from unlearn.models.diffusion import pipeline

            return pipeline.options(folder)[1]
        home = folder / "unet" if index.is_file() else folder
        config = folders.config(home / "config.json")
        options = {"network": {"class": config.get("_class_name"), **folders.public(config)}}
        if wrong := _unfit(options["network"], None):
            raise WeightsError(f"{home}: {wrong}")
        if index.is_file():
            options["scheduler"] = folders.public(folders.config(folder / "scheduler" / "scheduler_config.json"))
        elif "scheduler" not in chosen:
            raise WeightsError(f"{folder} does not say how images are noised: give the pipeline's folder, or model.options.scheduler")
        if isinstance(config.get("sample_size"), int):
            options["image_size"] = config["sample_size"]
        return options

    def to_folder(self, folder: Path) -> None:
        """Write a pipeline folder of diffusers."""
        if self.latent:
            from unlearn.models.diffusion import pipeline

            return pipeline.write(self.state_dict(), self.options, folder)
        config = {"sample_size": self.options.image_size, **_config(self.options.network)}
        whole = diffusers.UNet2DModel(**config)
        whole.load_state_dict(_file("UNet2DModel").to_public(self.state_dict()), assign=True)
        scheduler = diffusers.DDPMScheduler.from_config(self.options.scheduler)
        diffusers.DDPMPipeline(whole, scheduler).save_pretrained(folder)


def _file(kind: str) -> ModuleType:
    return importlib.import_module(NETWORKS[kind].file)


def _config(network: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in network.items() if name != "class"}


def _noising(options: DiffusionOptions) -> noising.DiscreteNoising | flow.FlowMatching:
    if options.network["class"] != FLUX:
        return noising.DiscreteNoising(options.scheduler, bounded=options.vae is None)
    _, f = _space(options.vae)
    return flow.FlowMatching(options.scheduler, (options.image_size // f // 2) ** 2)


def _split(options: DiffusionOptions) -> tuple[nn.Module, nn.Module, nn.Module]:
    kind = options.network["class"]
    return _file(kind).split(_config(options.network), **{name: getattr(options, name) for name in NETWORKS[kind].own})


def _noise(clean: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard Gaussian noise twice in the shape of `clean`: of the condition, and eps. A row's does not depend on how many there are."""
    rows, channels, *size = clean.shape
    generator = _generator(seed, 0, clean.device)
    return torch.randn(rows, 2 * channels, *size, generator=generator, device=clean.device, dtype=clean.dtype).chunk(2, dim=1)


def _generator(seed: int, stream: int, device: torch.device) -> torch.Generator:
    """One generator for each purpose; none is that of the method's noise, which is seeded with `seed` itself."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
