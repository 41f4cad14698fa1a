"""What a run needs and what it costs, before it starts."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from unlearn import config
from unlearn.errors import ConfigError, DataError, StorageError, WeightsError
from unlearn.methods import base as methods
from unlearn.models import base
from unlearn.planning import cost, memory, search
from unlearn.planning.cost import Cost, Work
from unlearn.planning.memory import Strategy
from unlearn.run import resolve

UNITS = {"": 1, "k": 1, "m": 2, "g": 3, "t": 4}
# Share of the peak that a run is expected to reach where nobody says better.
MFU = {"cuda": 0.35, "cpu": 0.5}
# Assumed where GPUs are asked for and none can be seen.
GPU = "H100 80GB HBM3"


@dataclass(frozen=True)
class Device:
    """What one worker computes on. memory: bytes; peak: FLOP/s, plain: in float32; share: of it that is expected; seen: whether
    it was asked itself."""

    name: str
    cuda: bool
    memory: int
    peak: float
    plain: float
    share: float
    seen: bool


@dataclass(frozen=True)
class Report:
    """rows: strategies to run, the config's first. advice: (strategy, micro-batch) to take, or None where nothing fits.

    host: bytes that a worker takes on the host while it starts; sizes: images of each set, where the data is there.
    """

    run: config.RunConfig
    device: Device
    rows: list[search.Row]
    advice: tuple[Strategy, int] | None
    host: int
    sizes: dict[str, int] | None
    work: Work
    cost: Cost

    def change(self) -> list[str]:
        """The overrides that make the config take the advice; none where it does already."""
        if self.advice is None:
            return []
        wanted = search.settings(*self.advice)
        now = search.settings(memory.strategy(self.run), self.run.micro_batch)
        return [f"--set {key}={str(value).lower()}" for key, value in wanted.items() if now.get(key) != value]


def report(run: config.RunConfig, size: str | None = None, gpu: str | None = None, mfu: float | None = None) -> Report:
    """Everything that can be said of a run. size: memory of one worker's device; gpu: its kind; mfu: the share of its peak.

    Raises ConfigError for a size or a kind that nobody understands.
    """
    methods.create(run.method).check(base.adapter(run.model.family))
    found = device(run, size, gpu, mfu)
    made = search.Search(run, found.memory, found.cuda)
    sizes, steps, measured = _data(run)
    work = cost.work(run, sizes, steps, measured)
    return Report(
        run, found, made.table(), made.advice(), made.starting(), sizes, work, cost.cost(run, work, found.peak, found.plain, found.share)
    )  # fmt: skip


def device(run: config.RunConfig, size: str | None = None, gpu: str | None = None, mfu: float | None = None) -> Device:
    """What the run's workers compute on: as told, as found on this machine, or a guess."""
    import torch

    if not run.cluster.gpus_per_worker:
        held = parse_size(size) if size else _host() // run.cluster.workers
        rate = cost.cpu_peak(run.training.threads, run.cluster.workers)
        return Device("CPU", False, held, rate, rate, mfu or MFU["cpu"], size is None)
    here = torch.cuda.is_available() and not gpu
    name = torch.cuda.get_device_name() if here else gpu or GPU
    known = cost.known(name)
    if known is None and not here:
        raise ConfigError(f"--gpu {name}: not known; known: {', '.join(cost.MEMORY)}")
    held = parse_size(size) if size else torch.cuda.get_device_properties(0).total_memory if here else cost.MEMORY[known] << 30
    peak, plain = (cost.gpu_peak(known, dtype) if known else cost.gpu_measured(dtype) for dtype in (run.training.dtype, "fp32"))
    return Device(name if here else known, True, held, peak, plain, mfu or MFU["cuda"], here)


def parse_size(text: str) -> int:
    """Bytes of "80GiB", "24g", "512 MiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if not found:
        raise ConfigError(f"--memory {text}: write it as 80GiB or 512MiB")
    return int(float(found[1]) * 1024 ** UNITS[found[2]]) if found[2] else int(float(found[1]))


def _host() -> int:
    """Bytes of this machine's memory, or of what its control group may use."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    told = limit.read_text().strip() if limit.is_file() else "max"
    return min(whole, int(told)) if told.isdigit() else whole


def _data(settings: config.RunConfig) -> tuple[dict[str, int] | None, int | None, int | None]:
    """(images of each set, steps, images that the evaluation sees); None for what hangs on data that is not there."""
    try:
        run = resolve(settings)
    except (DataError, StorageError, WeightsError):
        return None, settings.training.steps, None
    measured = sum(map(len, run.measured.values())) if run.measured else None
    return {name: len(rows) for name, rows in run.sets.items()}, run.steps, measured
