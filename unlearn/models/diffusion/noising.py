"""How noise is added to images and latents, and the sampler that removes it; both as diffusers' schedulers do."""

import functools
import json
from typing import Any

import torch

import unlearn.torchvision_cpu  # noqa: F401  diffusers imports torchvision

import diffusers  # isort: skip


def scheduler(kind: str, config: dict[str, Any]) -> Any:
    """A scheduler of this class of diffusers, from the config of any scheduler; unknown keys of it are left out."""
    return getattr(diffusers, kind).from_config(config)


class DiscreteNoising:
    """y_t = sqrt(a_t) y + sqrt(1 - a_t) eps, with a_t the scheduler's alphas_cumprod, t = 0 .. T - 1.

    config: of a diffusers scheduler, as its scheduler_config.json holds it. bounded: whether y is within -1 .. 1, as
    pixels are, so that a sampler may clip it. Raises ValueError where diffusers cannot use the config.
    """

    def __init__(self, config: dict[str, Any], bounded: bool = True):
        self.config, self.bounded = config, bounded
        self.count, self.prediction, _ = _table(json.dumps(config, sort_keys=True))
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"scheduler.prediction_type {self.prediction!r}: epsilon, v_prediction and sample are known"
            )

    def times(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform timesteps (rows,)."""
        return torch.randint(self.count, (rows,), generator=generator, device=generator.device)

    def noised(self, clean: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """y_t, in the dtype of `clean`; computed in float32 or better."""
        signal, noise = self._scales(t, clean)
        return (signal * clean + noise * eps).to(clean.dtype)

    def target(self, clean: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network has to predict from y_t: eps, the velocity, or the clean image."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return clean
        signal, noise = self._scales(t, clean)
        return signal * eps - noise * clean

    def told(self, t: torch.Tensor) -> torch.Tensor:
        """What the network is given for these timesteps (rows,): the timesteps themselves."""
        return t

    def sampler(self, kind: str, steps: int, device: torch.device):
        """A diffusers scheduler with `steps` timesteps, from the last one, where everything is noise, down.

        kind: a class without randomness of its own.
        """
        # "leading" spacing would start below the last timestep, where the model expects to see something of the image.
        unclipped = {} if self.bounded else {"clip_sample": False, "thresholding": False}
        sampler = scheduler(kind, {**self.config, "timestep_spacing": "trailing", **unclipped})
        sampler.set_timesteps(steps, device=device)
        return sampler

    def _scales(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), in shapes that multiply `like`."""
        kept = self._kept(t).view(-1, *(1,) * (like.dim() - 1))
        kept = kept.to(torch.promote_types(like.dtype, torch.float32))
        return kept.sqrt(), (1 - kept).sqrt()

    def _kept(self, t: torch.Tensor) -> torch.Tensor:
        """a_t, (rows,) float32."""
        return _on(json.dumps(self.config, sort_keys=True), t.device)[t]


class GammaNoising(DiscreteNoising):
    """As Palette (arXiv 2111.05826): the network is given gamma_t = a_t, a number in (0, 1), in place of t.

    Training draws it between the levels of two neighbouring timesteps, so these are fractions: t = 1.25 lies a quarter
    of the way from gamma_1 to gamma_2.
    """

    def times(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Timesteps (rows,) float32: between two whole ones, each such interval equally likely."""
        low = torch.randint(self.count - 1, (rows,), generator=generator, device=generator.device)
        return low + torch.rand(rows, generator=generator, device=generator.device)

    def told(self, t: torch.Tensor) -> torch.Tensor:
        return self._kept(t)

    def _kept(self, t: torch.Tensor) -> torch.Tensor:
        low = t.long()
        high = (low + 1).clamp(max=self.count - 1)
        return torch.lerp(super()._kept(low), super()._kept(high), (t - low).float())


@functools.cache
def _table(config: str) -> tuple[int, str, torch.Tensor]:
    """(timesteps, prediction type, alphas_cumprod) of a scheduler's config, as JSON."""
    with torch.device("cpu"):  # the result is cached, and the first caller may be building a model on the meta device
        ddpm = scheduler("DDPMScheduler", json.loads(config))
    return ddpm.config.num_train_timesteps, ddpm.config.prediction_type, ddpm.alphas_cumprod


@functools.cache
def _on(config: str, device: torch.device) -> torch.Tensor:
    """alphas_cumprod on a device; copied there once."""
    return _table(config)[2].to(device)
