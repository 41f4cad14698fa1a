"""What a process keeps from one run to the next, so that the next one starts sooner; nothing of it changes a result."""

from collections.abc import Callable
from typing import Any

import torch

from unlearn import config
from unlearn.data import cache
from unlearn.models import weights
from unlearn.models.base import Adapter
from unlearn.run import Run
from unlearn.training import targets, teacher
from unlearn.training.targets import Targets
from unlearn.views import View


class Kept:
    """The images that were read, and the newest teacher with what it made of its inputs."""

    def __init__(self, targets: bool = False):
        """targets: whether what the teacher makes is kept too, in a quarter of the caches' limit: runs of one seed and
        equal sets ask it for the same, whatever their alpha."""
        self._with_targets, self._images = targets, None
        self.targets: Targets | None = None
        self._teacher: tuple[str, Adapter] | None = None

    def begin(self, run: Run, device: torch.device) -> None:
        """A run begins: the teacher will be asked for its targets."""
        if not self._with_targets:
            return
        limit = cache.limit(run.settings.data, run.settings.cluster.workers) // 4
        if self.targets is None or self.targets.limit != limit:
            self.targets = Targets(limit)
        self.targets.begin(targets.recipe(run, device))

    def images(self, settings: config.RunConfig) -> cache.ImageCache:
        """The cache for the images of a run; another one where its limit is another."""
        share = 0.75 if self._with_targets else 1
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
            if self._with_targets:
                for name in ("encode", "predict"):
                    setattr(self._teacher[1], name, self._remembered(name, getattr(self._teacher[1], name)))
        return self._teacher[1]

    def _remembered(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        """A pass of the teacher that computes nothing twice."""

        def remembered(inputs: torch.Tensor, view: View, seed: int = 0) -> Any:
            if not seed or self.targets is None:  # of no micro-batch
                return compute(inputs, view, seed)
            key = name, seed, inputs.shape
            return self.targets.get(key, inputs.device, lambda: compute(inputs, view, seed))

        return remembered
