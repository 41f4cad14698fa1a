"""What a process keeps from one run to the next, so that the next one starts sooner; nothing of it changes a result."""

import hashlib
from collections.abc import Callable

import torch

from unlearn import config
from unlearn.data import cache
from unlearn.data.recent import Recent
from unlearn.models import weights
from unlearn.models.base import Adapter, Embedding
from unlearn.training import teacher
from unlearn.views import View


class Kept:
    """The images that were read, and the newest teacher with what it made of its inputs."""

    def __init__(self, targets: bool = False):
        """targets: whether what the teacher makes on a CPU is kept too, in a quarter of the caches' limit: runs of one
        seed and equal sets ask it for the same, whatever their alpha. On a GPU the inputs could not be compared without
        a wait."""
        self._targets, self._images = targets, None
        self._teacher: tuple[str, Adapter] | None = None

    def images(self, settings: config.RunConfig) -> cache.ImageCache:
        """The cache for the images of a run; another one where its limit is another."""
        share = 0.75 if self._targets else 1
        made = cache.image_cache(settings.data, settings.cluster.workers, share)
        if self._images is None or (self._images.limit, self._images.workers) != (made.limit, made.workers):
            self._images = made
        return self._images

    def teacher(
        self, settings: config.RunConfig, device: torch.device, decoder: bool, sources: weights.Sources | None = None
    ) -> Adapter:
        """The teacher of a run, as teacher.load gives it. One that is sharded belongs to the engine of its run and is
        not kept."""
        if settings.training.engine == "deepspeed" and settings.training.zero_stage == 3:
            return teacher.load(settings, device, decoder, sources)
        source = (sources or {}).get(settings.model.weights or "")
        key = repr(
            (settings.model, settings.seed, device, decoder, teacher.dtype(settings), source and source.fingerprint)
        )
        if self._teacher is None or self._teacher[0] != key:
            self._teacher = None  # before the next one is built, so that there is one in memory
            self._teacher = key, teacher.load(settings, device, decoder, sources)
            if self._targets and device.type == "cpu":
                limit = cache.limit(settings.data, settings.cluster.workers) // 4
                self._teacher[1].encode = _Remembered(self._teacher[1].encode, limit)
        return self._teacher[1]


class _Remembered:
    """An `encode` that computes nothing twice. Inputs are compared by a digest of their bytes."""

    def __init__(self, encode: Callable[..., Embedding], limit: int):
        self.encode, self.known = encode, Recent(limit)

    def __call__(self, inputs: torch.Tensor, view: View, seed: int = 0) -> Embedding:
        digest = hashlib.blake2b(repr((inputs.dtype, inputs.shape, view.grid, seed)).encode())
        for tensor in (inputs, view.visible, view.hidden):
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

        def computed() -> tuple[Embedding, int]:
            made = self.encode(inputs, view, seed)
            return made, sum(level.nbytes for level in ([made] if isinstance(made, torch.Tensor) else made))

        return self.known.get(digest.digest(), computed)
