"""How noise is added to images and latents, and the sampler that removes it; both as diffusers' schedulers do."""

import functools
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

import unlearn.torchvision_cpu  # noqa: F401  diffusers imports torchvision
from unlearn.errors import WeightsError
from unlearn.models import base, folders

import diffusers  # isort: skip

# diffusers' schedulers that add noise as DiscreteNoising does, and those that add it as flow.FlowMatching does.
DISCRETE = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
# What decides how noise is added, and the schedules of it that all of these classes know.
_DECISIVE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip
_COMMON = ("linear", "scaled_linear", "squaredcos_cap_v2")


def read(folder: Path, known: tuple[str, ...]) -> dict[str, Any]:
    """The config of the scheduler in a folder of diffusers, with what its own class has where the file says nothing.

    known: the classes that it may be of. Raises WeightsError.
    """
    named = folders.config(folder / "scheduler_config.json")
    kind, config = named.get("_class_name"), folders.public(named)
    if kind is not None and kind not in known:
        raise WeightsError(
            f"{folder} holds a {kind}, which adds noise in another way than is known here for such a network, or is "
            f"unknown: give a model that was trained as for {known[0]}"
        )
    ours = inspect.signature(getattr(diffusers, known[0])).parameters
    theirs = inspect.signature(getattr(diffusers, kind or known[0])).parameters
    missing = {
        name: theirs[name].default for name in _DECISIVE if name in theirs and name in ours and name not in config
    }
    return config | {name: value for name, value in missing.items() if value != ours[name].default}


def tell_replaced(recorded: dict[str, Any], chosen: dict[str, Any], source: str) -> None:
    """Warn where an option `scheduler` takes the place of the one that weights came with, and leaves part of it out."""
    if isinstance(asked := chosen.get("scheduler"), dict):
        known = inspect.signature(getattr(diffusers, DISCRETE[0])).parameters
        lost = [
            name for name in (*_DECISIVE, "trained_betas")
            if name in recorded and name not in asked and name in known and recorded[name] != known[name].default
        ]  # fmt: skip
        if lost:
            base.tell(
                f"model.options.scheduler takes the place of the whole scheduler of {source}: {', '.join(lost)}, which "
                "it leaves out, have diffusers' defaults"
            )


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
        table = _table(json.dumps(config, sort_keys=True))
        self.count, self.prediction = table.count, table.prediction

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
        solver = str(self.config.get("algorithm_type", ""))
        certain = {"algorithm_type": solver.removeprefix("sde-")} if solver.startswith("sde-") else {}
        sampler = scheduler(kind, spelled_out(self.config) | {"timestep_spacing": "trailing", **unclipped, **certain})
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


def spelled_out(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's config with the betas themselves in it, where its schedule is one that only DDPM's class knows."""
    if config.get("beta_schedule", "linear") in _COMMON or config.get("trained_betas") is not None:
        return config
    plain = {**config, "rescale_betas_zero_snr": False}
    return {**config, "beta_schedule": "linear", "trained_betas": _ddpm(plain).betas.tolist()}


class Table(NamedTuple):
    """What a scheduler's config says of the noise. kept: alphas_cumprod, (count,)."""

    count: int
    prediction: str
    kept: torch.Tensor


def _ddpm(config: dict[str, Any]) -> Any:
    # Results are cached, and the first caller may be building a model on the meta device, or of fake tensors.
    with torch.device("cpu"), unset_fake_temporarily():
        return scheduler("DDPMScheduler", config)


@functools.cache
def _table(config: str) -> Table:
    """The table of a scheduler's config, given as JSON. Raises ValueError where it is none."""
    settings = json.loads(config)
    count = settings.get("num_train_timesteps", 1)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"scheduler.num_train_timesteps {count!r} is no whole number above zero")
    ddpm = _ddpm(settings)
    count, prediction, kept = ddpm.config.num_train_timesteps, ddpm.config.prediction_type, ddpm.alphas_cumprod
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"scheduler.prediction_type {prediction!r}: epsilon, v_prediction and sample are known")
    if kept.shape != (count,):
        raise ValueError(f"scheduler.trained_betas has {kept.numel()} values for {count} timesteps")
    with unset_fake_temporarily():  # which have no values
        if not ((ddpm.betas >= 0) & (ddpm.betas <= 1)).all():
            raise ValueError("scheduler: its betas are no schedule, each must lie between 0 and 1")
        if prediction == "epsilon" and not kept[-1]:
            raise ValueError(
                "scheduler.prediction_type epsilon does not go with rescale_betas_zero_snr: nothing of the image is "
                "left at the last timestep, so its noise says nothing of it; v_prediction and sample do"
            )
    return Table(count, prediction, kept)


@functools.cache
def _on(config: str, device: torch.device) -> torch.Tensor:
    """alphas_cumprod on a device; copied there once."""
    return _table(config).kept.to(device)
