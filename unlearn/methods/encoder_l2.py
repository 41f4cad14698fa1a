"""The paper's method (arXiv 2402.00351): keep the embeddings of retain images, send those of forget images to noise.

    loss = mean over R of |E(T(x)) - E0(T(x))|² + alpha · mean over F of |E(T(x)) - E0(T(n))|²,   n ~ N(0, Sigma)

|·|² is the mean squared error over all elements of the embedding, summed over its levels where it has several; with
`distance: relative` each level's error is divided by the mean square of its target, so that no level drowns the others. The
teacher is routed: one pass over [retain images, noise], so a row costs one teacher forward, not two.
"""

from typing import Literal

import torch
from pydantic import Field

from unlearn import config
from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods.base import Method, Terms
from unlearn.models.base import Adapter, Embedding


def distance(embedding: Embedding, target: Embedding, relative: bool = False) -> torch.Tensor:
    """Mean squared error in float32 or better over each level's elements, summed over levels: a scalar.

    relative: each level's error is divided by the mean square of its target.
    """
    if isinstance(embedding, torch.Tensor):
        assert isinstance(target, torch.Tensor), "both are of one encoder"
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        target = target.to(dtype)
        error = (embedding.to(dtype) - target).square().mean()
        return error / target.square().mean().clamp_min(1e-12) if relative else error
    levels = (distance(x, y, relative) for x, y in zip(embedding, target, strict=True))
    return sum(levels, start=torch.zeros((), device=embedding[0].device))


def rows(embedding: Embedding, start: int, stop: int | None) -> Embedding:
    """Rows of every level."""
    return embedding[start:stop] if isinstance(embedding, torch.Tensor) else [level[start:stop] for level in embedding]


class EncoderL2Options(config.Method):
    """Of the paper's method."""

    alpha: float = Field(default=0.25, ge=0, allow_inf_nan=False, description="weight of the forget term")
    noise: Literal["standard", "batch", "dataset"] = Field(
        default="standard", description="covariance of the target noise"
    )
    noise_region: Literal["image", "hole"] | None = Field(
        default=None,
        description="where the teacher's input is noise; none: everywhere, for diffusion models in the hole",
    )
    distance: Literal["mse", "relative"] = Field(
        default="mse", description="relative: each level's error is divided by the mean square of its target"
    )


class EncoderL2(Method):
    """Keep the embeddings of retain images, send those of forget images to noise; the encoder alone is trained."""

    name = "encoder_l2"
    Options = EncoderL2Options
    options: EncoderL2Options

    def __init__(self, options: EncoderL2Options):
        super().__init__(options)
        self._mean: torch.Tensor | None = None
        self._mix: torch.Tensor | None = None

    def check(self, model: type[Adapter]) -> None:
        if self.options.noise_region == "hole" and not model.encoder_sees_hole:
            raise ConfigError(
                f"method.noise_region hole: the encoder of {model.family} never sees the hole, so nothing would be forgotten; use image"
            )
        if self.options.noise != "standard" and not model.continuous:
            raise ConfigError(
                f"method.noise {self.options.noise}: the inputs of {model.family} are tokens, not numbers; use standard"
            )

    def sample_size(self) -> int:
        return 256 if self.options.noise == "dataset" else 0

    def prepare(self, inputs: torch.Tensor) -> None:
        """Measure the mean and covariance of the channels over some training images, for `noise: dataset`."""
        if self.options.noise != "dataset":
            return
        channels = inputs.double().transpose(0, 1).flatten(1)
        count = len(channels)
        covariance = torch.cov(channels) + 1e-8 * torch.eye(count, dtype=torch.float64, device=channels.device)
        self._mean = channels.mean(1).view(1, count, 1, 1)
        self._mix = torch.linalg.cholesky(covariance)

    def noise(self, batch: Batch, student: Adapter) -> torch.Tensor:
        """The teacher's inputs for forget rows, in their shape, drawn from the batch's seed."""
        images = batch.images[batch.retain :]
        generator = torch.Generator(images.device).manual_seed(batch.seed)
        noise = student.noise_like(images, generator)
        if self.options.noise == "batch":
            noise = noise * batch.images.std() + batch.images.mean()
        elif self.options.noise == "dataset":
            assert self._mix is not None and self._mean is not None, "`prepare` is called before the first step"
            mixed = torch.einsum("dc,nchw->ndhw", self._mix.to(noise), noise)
            noise = mixed + self._mean.to(noise)
        if (self.options.noise_region or student.noise_region) == "hole":
            noise = student.fill_hole(images, noise, batch.view.rows(batch.retain, len(batch.images)))
        return noise

    def weights(self) -> dict[str, float]:
        return {"forget": self.options.alpha}

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        assert teacher is not None, "the trainer loads a teacher for every method that needs one"
        with torch.no_grad():
            routed = torch.cat([batch.images[: batch.retain], self.noise(batch, student)])
            target = teacher.encode(routed, batch.view, batch.seed)
        embedding, relative = student.encode(batch.images, batch.view, batch.seed), self.options.distance == "relative"
        retain = distance(rows(embedding, 0, batch.retain), rows(target, 0, batch.retain), relative)
        forget = distance(rows(embedding, batch.retain, None), rows(target, batch.retain, None), relative)
        return {"retain": retain, "forget": forget}
