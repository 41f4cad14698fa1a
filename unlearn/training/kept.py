"""What a process keeps from one run to the next, so that the next one starts sooner; nothing of it changes a result."""

import torch

from unlearn import config
from unlearn.data import cache
from unlearn.models import weights
from unlearn.models.base import Adapter
from unlearn.training import teacher


class Kept:
    """The images that were read, and the newest teacher."""

    def __init__(self):
        self._images: cache.ImageCache | None = None
        self._teacher: tuple[str, Adapter] | None = None

    def images(self, settings: config.RunConfig) -> cache.ImageCache:
        """The cache for the images of a run; another one where its limit is another."""
        limit = cache.limit(settings.data, settings.cluster.workers)
        if self._images is None or self._images.limit != limit:
            self._images = cache.ImageCache(limit)
        return self._images

    def teacher(
        self, settings: config.RunConfig, device: torch.device, decoder: bool, sources: weights.Sources | None = None
    ) -> Adapter:
        """The teacher of a run, as teacher.load gives it. One that is sharded belongs to the engine of its run and is not kept."""
        if settings.training.engine == "deepspeed" and settings.training.zero_stage == 3:
            return teacher.load(settings, device, decoder, sources)
        source = (sources or {}).get(settings.model.weights or "")
        key = repr(
            (settings.model, settings.seed, device, decoder, teacher.dtype(settings), source and source.fingerprint)
        )
        if self._teacher is None or self._teacher[0] != key:
            self._teacher = None  # before the next one is built, so that there is one in memory
            self._teacher = key, teacher.load(settings, device, decoder, sources)
        return self._teacher[1]
