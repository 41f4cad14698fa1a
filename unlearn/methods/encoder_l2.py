"""The paper's method (arXiv 2402.00351): keep the embeddings of retain images, send those of forget images to noise.

    loss = mean over R of |E(T(x)) - E0(T(x))|² + alpha · mean over F of |E(T(x)) - E0(T(n))|²,   n ~ N(0, Sigma)

|·|² is the mean squared error over all elements of the embedding, summed over its levels where it has several; with
`distance: relative` each level's error is divided by the mean square of its target, so that no level drowns the others.
The teacher is routed: one pass over [retain images, noise], so a row costs one teacher forward, not two.

`target` puts something plausible in the place of T(n), since conspicuous noise gives away what was forgotten: the
forget image blurred, another image that is kept, or, where the encoder sees the hole, the image with nothing in its
hole.
"""

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional

from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods.base import AlphaOptions, ForgetOptions, Method, Terms
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


def another(images: torch.Tensor, retain: int) -> torch.Tensor:
    """For each row behind `retain` one of the rows before it, repeated as often as needed."""
    return images[:retain][torch.arange(len(images) - retain, device=images.device) % retain]


def blurred(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Images (B, C, S, S) scaled down by `factor`, to 1 x 1 at least, and up again."""
    side = images.shape[-1]
    small = functional.interpolate(images, max(1, side // factor), mode="area")
    return functional.interpolate(small, side, mode="bilinear", align_corners=False)


class TargetOptions(ForgetOptions):
    """Of a method that sends the embeddings of forget images to a target."""

    target: Literal["noise", "blur", "retain", "background"] = Field(
        default="noise",
        description="what the teacher sees in place of a forget image: noise; blur, that image blurred; retain, a "
        "retained image of the batch; background, the image with its hole empty, where the encoder sees "
        "the hole",
    )
    blur: int = Field(
        default=16, ge=2, description="with target blur: how many times smaller the image is made and scaled up again"
    )
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


class EncoderL2Options(TargetOptions, AlphaOptions):
    """Of the paper's method."""


class EncoderL2(Method):
    """Keep the embeddings of retain images, send those of forget images to noise; the encoder alone is trained."""

    name = "encoder_l2"
    Options = EncoderL2Options
    options: TargetOptions

    def __init__(self, options: TargetOptions):
        super().__init__(options)
        self._mean: torch.Tensor | None = None
        self._mix: torch.Tensor | None = None

    def check(self, model: type[Adapter]) -> None:
        if self.options.target != "noise":
            return self._check_target(model)
        if self.options.noise_region == "hole" and not model.encoder_sees_hole:
            raise ConfigError(
                f"method.noise_region hole: the encoder of {model.family} never sees the hole, so nothing would be "
                "forgotten; use image"
            )
        if self.options.noise != "standard" and not model.continuous:
            raise ConfigError(
                f"method.noise {self.options.noise}: the inputs of {model.family} are tokens, not numbers; use standard"
            )

    def _check_target(self, model: type[Adapter]) -> None:
        """Raise ConfigError for a target that this family cannot have, and for options that are of noise alone."""
        target = self.options.target
        if self.options.noise != "standard" or self.options.noise_region:
            raise ConfigError(f"method.target {target}: noise and noise_region are of target noise; leave them out")
        if target == "blur" and not model.continuous:
            raise ConfigError(
                f"method.target blur: the inputs of {model.family} are tokens, not numbers; use noise or retain"
            )
        if target == "background" and not model.encoder_sees_hole:
            raise ConfigError(
                f"method.target background: the encoder of {model.family} never sees the hole, so nothing would be "
                "forgotten; use noise, blur or retain"
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

    def target(self, batch: Batch, student: Adapter) -> torch.Tensor:
        """What the teacher sees in place of the forget rows, in their shape."""
        if self.options.target == "noise":
            return self.noise(batch, student)
        if self.options.target == "retain":
            return another(batch.images, batch.retain)
        images = batch.images[batch.retain :]
        if self.options.target == "blur":
            return blurred(images, self.options.blur)
        return student.fill_hole(images, torch.zeros_like(images), batch.view.rows(batch.retain, len(batch.images)))

    def weights(self) -> dict[str, float]:
        return {"forget": self.options.alpha} if isinstance(self.options, AlphaOptions) else {}

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        assert teacher is not None, "the trainer loads a teacher for every method that needs one"
        with torch.no_grad():
            routed = torch.cat([batch.images[: batch.retain], self.target(batch, student)])
            target = teacher.encode(routed, batch.view, batch.seed)
        embedding, relative = student.encode(batch.images, batch.view, batch.seed), self.options.distance == "relative"
        retain = distance(rows(embedding, 0, batch.retain), rows(target, 0, batch.retain), relative)
        forget = distance(rows(embedding, batch.retain, None), rows(target, batch.retain, None), relative)
        return {"retain": retain, "forget": forget}
