"""What no trial of a sweep may exceed, asked once for what its trials have in common."""

import threading

from jobs import train
from unlearn import config
from unlearn.errors import ConfigError
from unlearn.planning import memory
from unlearn.planning import report as planning
from unlearn.planning.search import Search
from unlearn.search.space import Sweep


class Limits:
    """What the trials of a sweep have in common and may not exceed; each question is answered once."""

    def __init__(self, sweep: Sweep):
        self.device = planning.device(sweep.settings)
        self.models: set[str] = set()
        self.needed: dict[str, tuple[bool, float]] = {}
        self.lock = threading.Lock()

    def check(self, settings: config.RunConfig) -> None:
        """Raises UnlearnError where the models cannot be had, and ConfigError where the run does not fit a worker's
        memory. What another thread is asking already is waited for."""
        with self.lock:
            self._check(settings)

    def _check(self, settings: config.RunConfig) -> None:
        training, evaluation = settings.training, settings.evaluation
        looking = evaluation.features, evaluation.features_weights, evaluation.lpips_weights
        key = repr((settings.model, evaluation.oracle, looking, settings.data.augment))
        if key not in self.models:
            train.check_models(settings)
            self.models.add(key)
        strategy = memory.strategy(settings)
        key = repr((settings.model, settings.method.name, settings.train_views, settings.micro_batch,
                training.batch_size, training.dtype, training.ema,
                    training.forget_fraction, strategy))  # fmt: skip
        if key not in self.needed:
            row = Search(settings, self.device.memory, self.device.cuda).row(strategy)
            self.needed[key] = row.fits, row.estimate.total / 2**30
        fits, gib = self.needed[key]
        if not fits:
            raise ConfigError(
                f"a worker needs {gib:.3g} GiB with a micro-batch of {settings.micro_batch} ({strategy}); "
                f"{self.device.name} has {self.device.memory / 2**30:.3g} GiB: lower training.micro_batch_size"
            )
