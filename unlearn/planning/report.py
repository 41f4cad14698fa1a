"""What a run needs and what it costs, before it starts."""

import contextlib
from dataclasses import dataclass

from unlearn import config, sizes
from unlearn.data import cache, held_out, selection
from unlearn.data.selection import RowSet
from unlearn.errors import ConfigError, DataError, StorageError
from unlearn.methods import base as methods
from unlearn.models import base
from unlearn.planning import cost, memory, search
from unlearn.planning.cost import Cost, Work
from unlearn.planning.memory import Strategy
from unlearn.planning.shape import model_options
from unlearn.run import steps

# Share of the device's peak that a run is expected to reach, unless it is given.
MFU = {"cuda": 0.35, "cpu": 0.5}
# Assumed where GPUs are asked for and there is none on this machine.
GPU = "H100 80GB HBM3"


@dataclass(frozen=True)
class Device:
    """What one worker computes on. memory: bytes. peak: FLOP/s, plain: in float32. share: of the peak that is expected.
    guessed: whether its kind is a guess."""

    name: str
    cuda: bool
    memory: int
    peak: float
    plain: float
    share: float
    guessed: bool


@dataclass(frozen=True)
class Report:
    """rows: strategies, the config's first. advice: (strategy, micro-batch) to take, or None where nothing fits.

    host: bytes that a worker takes on the host while it starts; caches: those that its caches come to there. sizes:
    images of each set, where the data is here. notes: sentences that a reader of the figures must know.
    """

    settings: config.RunConfig
    device: Device
    rows: list[search.Row]
    advice: tuple[Strategy, int] | None
    host: int
    caches: int
    sizes: dict[str, int] | None
    work: Work
    cost: Cost
    notes: list[str]

    def change(self) -> list[str]:
        """The overrides that make the config take the advice; none where it does already."""
        if self.advice is None:
            return []
        wanted = search.settings(*self.advice)
        now = search.settings(memory.strategy(self.settings), self.settings.micro_batch)
        return [f"--set {key}={str(value).lower()}" for key, value in wanted.items() if now.get(key) != value]


def report(
    settings: config.RunConfig, size: str | None = None, gpu: str | None = None, mfu: float | None = None
) -> Report:
    """Everything that can be said of a run before it starts; no weight is read.

    size: memory of one worker's device; gpu: its kind; mfu: the share of its peak that is reached. Raises ConfigError
    for a size or a kind that is not understood, WeightsError where nothing says the model's shape.
    """
    methods.create(settings.method).check(base.adapter(settings.model.family))
    options, note = model_options(settings.model)
    notes = [note] if note else []
    if gpu and not settings.cluster.gpus_per_worker:
        notes.append(f"--gpu {gpu} is not looked at: cluster.gpus_per_worker is 0, so the workers compute on CPUs")
    worker = device(settings, size, gpu, mfu)
    sets, count, measured = _data(settings)
    caches = memory.caches(settings, sets, _cache_limit(settings, worker))
    strategies = search.Search(settings, worker.memory, worker.cuda, caches, options)
    images = None if sets is None else {name: len(rows) for name, rows in sets.items()}
    work = cost.work(settings, images, count, measured, options)
    seconds = cost.cost(settings, work, worker.peak, worker.plain, worker.share)
    table, advice, host = strategies.table(), strategies.advice(), strategies.starting()
    return Report(settings, worker, table, advice, host, caches, images, work, seconds, notes)


def device(
    settings: config.RunConfig, size: str | None = None, gpu: str | None = None, mfu: float | None = None
) -> Device:
    """What the run's workers compute on: as given, as found on this machine, or GPU."""
    import torch

    training, cluster = settings.training, settings.cluster
    if not cluster.gpus_per_worker:
        capacity = _size(size) if size else sizes.host_memory() // cluster.workers
        rate = cost.cpu_peak(training.threads, cluster.workers)
        return Device("CPU", False, capacity, rate, rate, mfu or MFU["cpu"], False)
    here = torch.cuda.is_available() and not gpu
    name = torch.cuda.get_device_name() if here else gpu or GPU
    known = cost.known_gpu(name)
    if known is None and not here:
        raise ConfigError(f"--gpu {name}: not known; known: {', '.join(cost.GPU_MEMORY)}")
    if size:
        capacity = _size(size)
    else:
        whole = cost.GPU_MEMORY[known] << 30 if known and not here else torch.cuda.get_device_properties(0).total_memory
        capacity = int(whole * min(1, cluster.gpus_per_worker))  # workers may share a GPU
    peak, plain = (
        cost.gpu_peak(known, dtype) if known else cost.gpu_measured(dtype) for dtype in (training.dtype, "fp32")
    )
    return Device(
        known if known and not here else name, True, capacity, peak, plain, mfu or MFU["cuda"], not here and not gpu
    )


def _size(text: str) -> int:
    try:
        return sizes.parse(text)
    except ValueError as e:
        raise ConfigError(f"--memory {text}: {e}") from None


def _cache_limit(settings: config.RunConfig, worker: Device) -> int:
    """The limit of a worker's caches. Where no key says it, it depends on the host, which is this machine or is not
    known."""
    import torch

    if settings.data.cache_bytes is not None:
        return cache.limit(settings.data, settings.cluster.workers)
    if worker.cuda and not torch.cuda.is_available():
        return cache.DEFAULT
    return cache.default_limit(sizes.host_memory() // settings.cluster.workers if worker.cuda else worker.memory)


def _data(settings: config.RunConfig) -> tuple[dict[str, RowSet] | None, int | None, int | None]:
    """(the sets, steps, images that the evaluation sees); None for what depends on data that is not here."""
    method = methods.method_class(settings.method.name)
    try:
        sets = selection.sets(settings.data, settings.seed)
    except (DataError, StorageError):
        return None, settings.training.steps, None
    measured = None
    if method.needs_forget:
        with contextlib.suppress(DataError, StorageError):
            measured = sum(map(len, held_out.sets(settings, sets).values()))
    if not method.needs_forget:
        sets.pop("forget", None)
    return sets, steps(settings, sets), measured
