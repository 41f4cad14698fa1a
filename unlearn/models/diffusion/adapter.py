"""Diffusion models that fill in holes, on pixels or on an autoencoder's latents: networks and schedulers of diffusers.

The encoder is the network's way down and its middle (of a transformer the first blocks). The embedding compared is
every level that the encoder hands to the decoder. On pixels (Palette, arXiv 2111.05826) the network sees [condition,
noisy image]: the image with Gaussian noise in its hole, and the image with y_t in its hole, where y_t is what is
hidden, with noise added. On latents it sees y_t of the whole image, the hole, and the latents of the image with a grey
hole.
Shapes: B images of S x S pixels. Noise is added to C channels of h x w: 3 of S x S for pixels, or those of latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, folders
from unlearn.models.diffusion import autoencoder, flow, ldm, networks, noising, palette, pipeline, prompts
from unlearn.models.diffusion.options import DiffusionOptions
from unlearn.models.diffusion.shapes import VARIANTS
from unlearn.views import View

import diffusers  # isort: skip  after noising, which prepares torchvision


class Diffusion(base.Adapter):
    """The embedding compared is the list of all levels that the network's encoder hands to its decoder.

    Inputs are images (B, 3, S, S), or latents (B, 2 C, h, w): those of the images, then those of the images with a grey
    hole. Timesteps, noise and the noise of the condition are drawn from the forward's seed; each row has its own.
    """

    family = "diffusion"
    Options = DiffusionOptions
    noise_region = "hole"
    first_stage_names = autoencoder.AUTOENCODER_TENSORS
    option_files = ("*.json", prompts.FILE)
    variants = VARIANTS

    options: DiffusionOptions
    decoder: nn.Module
    shared: nn.Module
    first_stage: autoencoder.FirstStage

    def __init__(self, options: DiffusionOptions):
        super().__init__(options)
        try:
            self.noising = _noising(options)
            self.encoder, self.decoder, self.shared = networks.split(options.network, options)
            if options.vae is not None:
                self.first_stage, latent_decoder = autoencoder.split(options.vae)
                self.decoder.add_module("back", latent_decoder)
        except (  # what diffusers raises for a config that its classes do not expect, or whose packages are missing
            ValueError, TypeError, NotImplementedError, AttributeError, KeyError, ImportError, UnboundLocalError
        ) as e:  # fmt: skip
            raise ConfigError(
                f"model.options: diffusers cannot build this network and scheduler: {' '.join(str(e).split())[:300]}"
            ) from None
        if options.sampling_steps > self.noising.count:
            raise ConfigError(
                f"model.options.sampling_steps {options.sampling_steps} is more than the scheduler's "
                f"{self.noising.count} timesteps"
            )
        self._try_sampler()
        self.layout = networks.module(options.network["class"]).layout
        self.shared.requires_grad_(False)
        self._initialise()
        self._flops: int | None = None
        self.guidance: float | None = None

    def _try_sampler(self):
        """Raise ConfigError now where `reconstruct` could not sample, not after training."""
        o, cpu = self.options, torch.device("cpu")
        try:
            with unset_fake_temporarily(), cpu:
                self.noising.sampler(o.sampler, o.sampling_steps, cpu)
        except (ValueError, TypeError, NotImplementedError, IndexError, ImportError) as e:
            why = " ".join(str(e).split())[:200]
            raise ConfigError(f"model.options: {o.sampler} cannot sample with this scheduler: {why}") from None

    def _initialise(self):
        # `shared` is never trained, not even in pretraining: random features of time, as large as activations are.
        for module in self.shared.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, prompt in self.shared.named_buffers():
            if name in ("prompt", "pooled"):  # zeros would leave the layers that attend to them without a gradient
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
        texts = self._texts(len(inputs), seed, inputs.device)
        return self.encoder(sample, *self.shared(self.noising.told(t), inputs.dtype, texts))

    def predict(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """Noise, velocity or image, (B, C, h, w)."""
        sample, t, _ = self._noised(inputs, view, seed)
        return self._predict(sample, t, self._texts(len(inputs), seed, inputs.device))

    def targets(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        return self._noised(inputs, view, seed)[2]

    def loss(self, predictions: torch.Tensor, targets: torch.Tensor, view: View) -> torch.Tensor:
        """Mean squared error of the prediction: in the hole, or over all latents."""
        error = predictions.to(targets.dtype) - targets
        if self.latent:
            return error.square().mean()
        hole = view.pixel_mask(error.shape[-1]).expand_as(error)
        return torch.where(hole, error, 0).square().sum() / hole.sum()

    def difference(self, one: torch.Tensor, other: torch.Tensor, view: View) -> torch.Tensor:
        return self.loss(one, other.to(torch.promote_types(other.dtype, torch.float32)), view)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """Sampled from the same noise for every image, so that a row does not depend on its batch."""
        hole = view.pixel_mask(images.shape[-1])
        known = torch.where(hole, 0, images)
        known = self.first_stage.latents(known) if self.latent else known
        condition, x = (n.expand_as(known) for n in _noise(known[:1], 0))
        known = known if self.latent else torch.where(hole, condition, known)
        sampler = self.noising.sampler(self.options.sampler, self.options.sampling_steps, known.device)
        for t in sampler.timesteps:
            x = sampler.step(self._guided(self.layout(x, known, hole), t.expand(len(x))), t, x).prev_sample
        filled = self.decoder.get_submodule("back")(x) if self.latent else x
        return torch.where(hole, filled.to(images.dtype), images)

    def _noised(self, inputs: torch.Tensor, view: View, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(what the network sees, timesteps (B,), what it should predict, in float32 or better)."""
        hole = view.pixel_mask(self.options.image_size)
        clean, known = inputs.chunk(2, dim=1) if self.latent else (inputs, None)
        condition, eps = _noise(clean, seed)
        known = torch.where(hole, condition, clean) if known is None else known
        t = self.noising.times(len(inputs), _generator(seed, 1, inputs.device))
        sample = self.layout(self.noising.noised(clean, eps, t), known, hole)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        return sample, t, self.noising.target(clean.to(wide), eps.to(wide), t)

    def _texts(self, rows: int, seed: int, device: torch.device) -> torch.Tensor | None:
        """Which prompt each row has (rows,); None where there is one."""
        if not self.options.prompts:
            return None
        return torch.randint(self.options.texts, (rows,), generator=_generator(seed, 2, device), device=device)

    def guide(self, scale: float) -> None:
        if not self.latent:
            raise ConfigError("evaluation.guidance_scale: a network on pixels takes no prompt; leave it out")
        if self.options.network["class"] == networks.TRANSFORMER:
            networks.module(networks.TRANSFORMER).guide(self.shared, scale)
            return
        if "" not in self.options.prompts or not self.options.prompt:
            raise ConfigError(
                "evaluation.guidance_scale compares with the empty prompt: give model.options.prompt a text, and "
                "model.options.prompts ['']"
            )
        self.guidance = scale

    def _guided(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The prediction of `reconstruct`: with guidance it is led away from that without a prompt (arXiv
        2207.12598)."""
        prompted = self._predict(sample, t)
        if self.guidance is None:
            return prompted
        empty = torch.full_like(t, 1 + self.options.prompts.index(""), dtype=torch.long)
        plain = self._predict(sample, t, empty)
        return plain + self.guidance * (prompted - plain)

    def _predict(self, sample: torch.Tensor, t: torch.Tensor, texts: torch.Tensor | None = None) -> torch.Tensor:
        emb, context = self.shared(self.noising.told(t), sample.dtype, texts)
        return self.decoder(self.encoder(sample, emb, context), emb, context)

    def fill_hole(self, inputs: torch.Tensor, noise: torch.Tensor, view: View) -> torch.Tensor:
        """The inputs, with those of `noise` in the hole; the latents of the image with a grey hole stay as they are."""
        if not self.latent:
            return super().fill_hole(inputs, noise, view)
        (clean, known), noise = inputs.chunk(2, dim=1), noise.chunk(2, dim=1)[0]
        return torch.cat([super().fill_hole(clean, noise, view), known], dim=1)

    def flops(self, view: View) -> int:
        if self._flops is None:
            (channels, f), size = autoencoder.noised_space(self.options.vae), self.options.image_size
            with torch.device("meta"):
                encoder, _, shared = networks.split(self.options.network, self.options)
                noisy, t = torch.empty(1, channels, size // f, size // f), torch.zeros(1, dtype=torch.long)
                sample = self.layout(noisy, noisy, torch.empty(1, 1, size, size, dtype=torch.bool))
                self._flops = base.count_flops(lambda: encoder(sample, *shared(t, sample.dtype)))
        return self._flops

    @classmethod
    def from_public(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One file with diffusers' names, of any of the networks."""
        if any(name.startswith("encoder.") for name in tensors):
            return tensors
        transformer = any(name.startswith("transformer_blocks.") for name in tensors)
        return networks.module(networks.TRANSFORMER if transformer else networks.LATENT_UNET).from_public(tensors)

    @classmethod
    def from_file(
        cls, tensors: dict[str, torch.Tensor], arguments: dict[str, Any], chosen: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """A file of Palette, one of Stable Diffusion's own code, or one with diffusers' names."""
        if ldm.is_ldm(tensors):
            return ldm.read(tensors, chosen)
        if palette.is_palette(tensors):
            told = palette.options(tensors, scheduled="scheduler" in chosen)  # which says what is lacking
            return cls.from_public(palette.to_diffusers(tensors)), told
        if "shared.prompt" not in tensors and any(".attn2.to_k." in name for name in tensors):
            raise WeightsError(
                "a network on latents alone in one file does not say what it is told of a prompt: give its folder, "
                "with config.json, and the folder of its pipeline or VAE as model.first_stage"
            )
        gamma, tensors = "gammas" in tensors, palette.without_schedule(tensors)
        if (
            not gamma
            and "conditioning" not in chosen
            and tensors.get("conv_in.weight", torch.empty(0)).shape[1:2] == (6,)
        ):
            base.tell(
                "a UNet on pixels in a single file does not say what it is told of the noise; it is taken to be the "
                "timestep. Palette's is told gamma: set model.options.conditioning to timestep or gamma"
            )
        return cls.from_public(tensors), {"conditioning": "gamma"} if gamma else None

    @classmethod
    def placed(cls, tensors: dict[str, torch.Tensor], options: DiffusionOptions) -> dict[str, torch.Tensor]:
        """The blocks of a transformer on the side of the cut where `encoder_blocks` puts them."""
        if options.network["class"] != networks.TRANSFORMER:
            return tensors
        return networks.module(networks.TRANSFORMER).from_public(tensors, options.encoder_blocks)

    @classmethod
    def first_stage_from(cls, path: Path) -> dict[str, torch.Tensor]:
        """An autoencoder: a pipeline's folder of diffusers, one of the autoencoder alone, or one with TAEF2's files; or
        one file."""
        return autoencoder.first_stage_from(path)

    @classmethod
    def from_folder(
        cls, folder: Path, chosen: dict[str, Any], first_stage: Path | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A folder of diffusers: of a pipeline, or of a network alone, with the rest of its pipeline in
        `first_stage`."""
        if pipeline.is_latent(folder):
            return pipeline.read(folder, chosen, first_stage)
        options = cls.options_from_folder(folder, chosen)
        return cls.from_public(folders.tensors(_unet_folder(folder))), options

    @classmethod
    def options_from_folder(
        cls, folder: Path, chosen: dict[str, Any], first_stage: Path | None = None
    ) -> dict[str, Any]:
        if pipeline.is_latent(folder):
            return pipeline.options(folder, chosen, first_stage)
        network = networks.described(_unet_folder(folder))
        if reason := networks.mismatch(network, None):
            raise WeightsError(f"{_unet_folder(folder)}: {reason}")
        options = {"network": network}
        if (folder / "model_index.json").is_file():
            options["scheduler"] = noising.read(folder / "scheduler", noising.DISCRETE)
            noising.tell_replaced(options["scheduler"], chosen, str(folder))
        elif "scheduler" not in chosen:
            raise WeightsError(
                f"{folder} does not say how noise is added: give the pipeline's folder, or model.options.scheduler"
            )
        size = network.get("sample_size")
        return {**options, "image_size": size} if isinstance(size, int) else options

    def to_folder(self, folder: Path, origin: Path | None = None) -> str:
        """Write a pipeline folder of diffusers; of a network that is told gamma, which none of its pipelines knows,
        Palette's own file."""
        if self.latent:
            return pipeline.write(self.state_dict(), self.options, folder, origin)
        if self.options.conditioning == "gamma":
            return palette.write(
                networks.module(networks.PIXEL_UNET).to_public(self.state_dict()), self.options, folder
            )
        config = {"sample_size": self.options.image_size, **networks.arguments(self.options.network)}
        whole = diffusers.UNet2DModel(**config)
        whole.load_state_dict(networks.module(networks.PIXEL_UNET).to_public(self.state_dict()), assign=True)
        scheduler = noising.scheduler("DDPMScheduler", self.options.scheduler)
        diffusers.DDPMPipeline(whole, scheduler).save_pretrained(folder)
        return "diffusers.DDPMPipeline.from_pretrained(FOLDER)"


def _unet_folder(folder: Path) -> Path:
    return folder / "unet" if (folder / "model_index.json").is_file() else folder


def _noising(options: DiffusionOptions) -> noising.DiscreteNoising | flow.FlowMatching:
    if options.network["class"] != networks.TRANSFORMER:
        kind = noising.GammaNoising if options.conditioning == "gamma" else noising.DiscreteNoising
        return kind(options.scheduler, bounded=options.vae is None)
    _, f = autoencoder.noised_space(options.vae)
    return flow.FlowMatching(options.scheduler, (options.image_size // f // 2) ** 2)


def _noise(clean: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard Gaussian noise twice, each in the shape of `clean`: the condition's, and eps. A row's noise does not
    depend on how many rows there are."""
    rows, channels, *size = clean.shape
    generator = _generator(seed, 0, clean.device)
    both = torch.randn(rows, 2 * channels, *size, generator=generator, device=clean.device, dtype=clean.dtype)
    condition, eps = both.chunk(2, dim=1)
    return condition, eps


def _generator(seed: int, stream: int, device: torch.device) -> torch.Generator:
    """A generator for each purpose (`stream`); none is that of the method's noise, whose seed is `seed` itself."""
    drawn = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(drawn >> np.uint64(1)))
