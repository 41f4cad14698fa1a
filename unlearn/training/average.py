"""The exponential moving average of the trained weights, as diffusion models are sampled with (`training.ema`)."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from unlearn.training.fragments import Fragment


class Average:
    """average = decay x average + (1 - decay) x weights after every step, of this rank's float32 master weights.

    It lies beside them, cut as they are, so its pieces are fragments too. It begins at the weights as they are now.
    """

    def __init__(self, fragments: Sequence[Fragment], decay: float):
        self.decay = decay
        flats = {id(f.flat): f.flat for f in fragments}
        averages = {key: flat.detach().clone() for key, flat in flats.items()}
        self._weights, self._averages = list(flats.values()), list(averages.values())
        self.fragments = [replace(f, flat=averages[id(f.flat)]) for f in fragments]

    @torch.no_grad()
    def update(self) -> None:
        """Count in the weights of one more step. Nothing waits for the device."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
