"""The options of diffusion models."""

from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from unlearn.models import base
from unlearn.models.diffusion import autoencoder, networks
from unlearn.models.diffusion.shapes import LINEAR, PALETTE


class DiffusionOptions(base.ModelOptions):
    """Defaults are those of Palette at 256 px."""

    image_size: int = 256
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    grid: PositiveInt = 16
    # "class" and the config of that class of diffusers
    network: dict[str, Any] = PALETTE
    # config of the diffusers scheduler that the model was or will be trained with
    scheduler: dict[str, Any] = LINEAR
    # "class" and the config of the autoencoder in whose latents the network works; None: it works on pixels
    vae: dict[str, Any] | None = None
    # what a network on pixels is told of the noise: the timestep, or gamma, the share of variance left, as Palette's is
    conditioning: Literal["timestep", "gamma"] = "timestep"
    # the text for a network that takes one, and how many tokens long it is; None: zeros in place of its embedding
    prompt: str | None = ""
    tokens: PositiveInt = 77
    # further ones: training draws one of all for each image, `reconstruct` takes `prompt`
    prompts: tuple[str, ...] = ()
    # how many blocks of a transformer are the encoder; None: half of them
    encoder_blocks: PositiveInt | None = None
    # of `reconstruct`
    sampler: Literal["DDIMScheduler", "DPMSolverMultistepScheduler"] = "DDIMScheduler"
    sampling_steps: PositiveInt = 20

    @model_validator(mode="after")
    def _fits(self):
        if reason := networks.mismatch(self.network, self.vae):
            raise ValueError(reason)
        if self.prompts and (self.vae is None or self.prompt is None):
            raise ValueError("prompts are further ones beside `prompt`, of a network that takes text")
        if self.conditioning == "gamma" and self.vae is not None:
            raise ValueError("conditioning gamma is for networks on pixels: leave it out")
        _, f = autoencoder.noised_space(self.vae)
        halvings = networks.NETWORKS[self.network["class"]].halvings(self.network)
        for parts, what in (
            (f * 2**halvings, "what the network divides a side by"),
            (f * self.grid, f"{f} times the grid of views" if f > 1 else "the grid of views"),
        ):
            if self.image_size % parts:
                raise ValueError(f"image_size {self.image_size} is not a multiple of {parts}, {what}")
        return self

    @property
    def texts(self) -> int:
        """How many prompts there are."""
        return 1 + len(self.prompts)
