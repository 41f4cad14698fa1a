"""Flow matching (arXiv 2210.02747, as Flux uses it): how noise is added to images, and the sampler that removes it.

x_s = (1 - s) x + s eps, and the network predicts the velocity eps - x. Its timestep is t = 1000 s. The interface is
that of `noising.DiscreteNoising`.
"""

import functools
import json
import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from unlearn.models.diffusion import noising

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


class FlowMatching:
    """config: of a FlowMatchEulerDiscreteScheduler. tokens: of an image; the more, the noisier Flux's timesteps are."""

    prediction = "flow"

    def __init__(self, config: dict[str, Any], tokens: int):
        self.config = config
        c = _checked(json.dumps(config, sort_keys=True))
        self.count = c.num_train_timesteps
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        self.mu = slope * (tokens - c.base_image_seq_len) + c.base_shift if c.use_dynamic_shifting else None
        if c.time_shift_type != "exponential" or c.invert_sigmas or c.stochastic_sampling:
            raise ValueError(
                f"{SCHEDULER}: only exponential time shifts, no inverted sigmas and no stochastic sampling are known"
            )
        # s is replaced by shift s / (1 + (shift - 1) s), in training and in sampling.
        self.shift = c.shift if self.mu is None else math.exp(self.mu)

    def times(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Timesteps (rows,), float32 in 0 .. T: uniform, then shifted as those of the sampler."""
        s = torch.rand(rows, generator=generator, device=generator.device)
        return self.shift * s / (1 + (self.shift - 1) * s) * self.count

    def noised(self, clean: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_s, in the dtype of `clean`; computed in float32 or better."""
        s = (t / self.count).view(-1, *(1,) * (clean.dim() - 1)).to(torch.promote_types(clean.dtype, torch.float32))
        return ((1 - s) * clean + s * eps).to(clean.dtype)

    def target(self, clean: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity."""
        return eps - clean

    def told(self, t: torch.Tensor) -> torch.Tensor:
        """What the network is given for these timesteps (rows,): the timesteps themselves."""
        return t

    def sampler(self, kind: str, steps: int, device: torch.device):
        """Euler's method over `steps` timesteps, from noise down. `kind` is for other models' samplers."""
        sampler = noising.scheduler(SCHEDULER, self.config)
        sampler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=self.mu, device=device)
        return sampler


@functools.cache
def _checked(config: str):
    """The config of a scheduler, given as JSON, with diffusers' defaults. Raises ValueError and TypeError."""
    with unset_fake_temporarily():  # the scheduler reads values of its tensors, which fake tensors do not have
        return noising.scheduler(SCHEDULER, json.loads(config)).config
