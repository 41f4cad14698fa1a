"""What a run logs every few steps: sums on the device, and their means when they are asked for."""

import contextlib
import math
import time

import torch

from unlearn import config
from unlearn.methods.base import Method
from unlearn.models.base import Adapter
from unlearn.training.engine import Engine
from unlearn.training.metrics import mfu, peak_memory


class Window:
    """Sums between two log rows, on the device; reading them is the only wait."""

    def __init__(self, settings: config.RunConfig, engine: Engine, student: Adapter, method: Method):
        self.settings, self.engine, self.student, self.method = settings, engine, student, method
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.count, self.flops, self.began = 0, 0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Stop the clock: writing a checkpoint is not counted as training."""
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped

    def watch(self, batches):
        """The batches, their FLOPs counted as they pass."""
        for batch in batches:
            self.flops += self.student.flops(batch.view) * len(batch.images) * self.method.units if batch.weight else 0
            yield batch

    def add(self, parts: dict[str, torch.Tensor]) -> None:
        self.count += 1
        for name, value in parts.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def row(self) -> dict:
        """Means over the window and over all ranks; images/s and FLOP/s of the whole settings."""
        micro = self.count * self.settings.accumulation
        scale = {name: self.count if name == "grad_norm" else micro for name in self.sums}
        means = self.engine.mean(torch.stack([self.sums[n].float() / scale[n] for n in self.sums])).tolist()
        seconds = time.perf_counter() - self.began
        row = dict(zip(self.sums, means, strict=True))
        for name, value in row.items():
            if not math.isfinite(value):
                raise RuntimeError(f"{name} is not finite")
        row["images_per_s"] = self.count * self.settings.training.batch_size / seconds
        if not self.method.needs_decoder:  # whose FLOPs have not been counted
            rate = self.flops / seconds
            row["flop_per_s"] = rate * self.engine.workers
            share = mfu(rate, self.engine.device) if self.settings.training.dtype == "bf16" else None
            row |= {} if share is None else {"mfu": share}
        row["peak_memory_gib"] = peak_memory(self.engine.device)
        self.restart()
        return row
