"""What a run needs and what it costs, before it starts."""

from dataclasses import dataclass

from unlearn import config, sizes
from unlearn.data import cache
from unlearn.data.selection import RowSet
from unlearn.errors import ConfigError, DataError, StorageError, WeightsError
from unlearn.methods import base as methods
from unlearn.models import base
from unlearn.planning import cost, memory, search
from unlearn.planning.cost import Cost, Work
from unlearn.planning.memory import Strategy
from unlearn.run import resolve

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

    host: bytes that a worker takes on the host while it starts; caches: those that its caches come to there;
    sizes: images of each set, where the data is there.
    """

    run: config.RunConfig
    device: Device
    rows: list[search.Row]
    advice: tuple[Strategy, int] | None
    host: int
    caches: int
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
    sets, steps, measured = _data(run)
    caches = memory.caches(run, sets, _cache_limit(run, found))
    made = search.Search(run, found.memory, found.cuda, caches)
    images = None if sets is None else {name: len(rows) for name, rows in sets.items()}
    work = cost.work(run, images, steps, measured)
    return Report(
        run, found, made.table(), made.advice(), made.starting(), caches, images, work,
        cost.cost(run, work, found.peak, found.plain, found.share),
    )  # fmt: skip


def device(run: config.RunConfig, size: str | None = None, gpu: str | None = None, mfu: float | None = None) -> Device:
    """What the run's workers compute on: as told, as found on this machine, or a guess."""
    import torch

    if not run.cluster.gpus_per_worker:
        held = _size(size) if size else sizes.host_memory() // run.cluster.workers
        rate = cost.cpu_peak(run.training.threads, run.cluster.workers)
        return Device("CPU", False, held, rate, rate, mfu or MFU["cpu"], size is None)
    here = torch.cuda.is_available() and not gpu
    name = torch.cuda.get_device_name() if here else gpu or GPU
    known = cost.known(name)
    if known is None and not here:
        raise ConfigError(f"--gpu {name}: not known; known: {', '.join(cost.MEMORY)}")
    held = _size(size) if size else torch.cuda.get_device_properties(0).total_memory if here else cost.MEMORY[known] << 30
    peak, plain = (cost.gpu_peak(known, dtype) if known else cost.gpu_measured(dtype) for dtype in (run.training.dtype, "fp32"))
    return Device(name if here else known, True, held, peak, plain, mfu or MFU["cuda"], here)


def _size(text: str) -> int:
    try:
        return sizes.parse(text)
    except ValueError as e:
        raise ConfigError(f"--memory {text}: {e}") from None


def _cache_limit(run: config.RunConfig, found: Device) -> int:
    """The limit of a worker's caches. Where no key says it, it depends on the host, which is known where it is the device, or is here."""
    if run.data.cache_bytes is not None:
        return run.data.cache_bytes
    if found.cuda and not found.seen:
        return cache.DEFAULT
    return cache.default_limit(sizes.host_memory() // run.cluster.workers if found.cuda else found.memory)


def _data(settings: config.RunConfig) -> tuple[dict[str, RowSet] | None, int | None, int | None]:
    """(the sets, steps, images that the evaluation sees); None for what hangs on data that is not there."""
    try:
        run = resolve(settings)
    except (DataError, StorageError, WeightsError):
        return None, settings.training.steps, None
    measured = sum(map(len, run.measured.values())) if run.measured else None
    return run.sets, run.steps, measured
