"""Plan: what a run needs and what it costs, before it starts; behind `unlearn plan` and `unlearn run --dry-run`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from unlearn import config
from unlearn.errors import ConfigError, DataError, StorageError
from unlearn.methods import base as methods
from unlearn.models import base
from unlearn.training import cost, loop, memory, plan
from unlearn.training.cost import Cost, Work
from unlearn.training.memory import Way

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
    """rows: ways to run, the config's first. advice: (way, micro-batch) to take, or None where nothing fits.

    host: bytes that a worker takes on the host while it starts; sizes: images of each set, where the data is there.
    """

    run: config.RunConfig
    device: Device
    rows: list[plan.Row]
    advice: tuple[Way, int] | None
    host: int
    sizes: dict[str, int] | None
    work: Work
    cost: Cost

    def change(self) -> list[str]:
        """The overrides that make the config take the advice; none where it does already."""
        if self.advice is None:
            return []
        wanted = plan.settings(*self.advice)
        now = plan.settings(memory.way(self.run), self.run.micro_batch)
        return [f"--set {key}={str(value).lower()}" for key, value in wanted.items() if now.get(key) != value]


def report(run: config.RunConfig, size: str | None = None, gpu: str | None = None, mfu: float | None = None) -> Report:
    """Everything that can be said of a run. size: memory of one worker's device; gpu: its kind; mfu: the share of its peak.

    Raises ConfigError for a size or a kind that nobody understands.
    """
    methods.create(run.method).check(base.adapter(run.model.family))
    found = device(run, size, gpu, mfu)
    made = plan.Plan(run, found.memory, found.cuda)
    sizes, steps, measured = _data(run)
    work = cost.work(run, sizes, steps, measured)
    return Report(
        run, found, made.table(), made.advice(), made.starting(), sizes, work, cost.cost(run, work, found.peak, found.plain, found.share)
    )  # fmt: skip


def dry_run(run: config.RunConfig, resume: bool = False, size: str | None = None, gpu: str | None = None, mfu: float | None = None) -> Report:
    """Check what `unlearn run` would check and whether it would fit; nothing is written and nothing trained.

    Raises UnlearnError: as `jobs.train.prepare`, and where the cluster has too little.
    """
    from jobs import train
    from jobs.cluster import reach

    train.ready(run, resume)
    found = reach(run.cluster, run.cluster.min_workers or run.cluster.workers) if run.training.engine == "deepspeed" else None
    made = report(run, size, gpu or found, mfu)
    if not made.rows[0].fits:
        raise ConfigError(_too_large(made))
    return made


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


def _data(run: config.RunConfig) -> tuple[dict[str, int] | None, int | None, int | None]:
    """(images of each set, steps, images that the evaluation sees); None for what hangs on data that is not there."""
    from unlearn.evaluation import pictures

    try:
        found = loop.sets(run)
        measured = sum(map(len, pictures.sets(run).values())) if methods.method_class(run.method.name).needs_teacher else None
    except (DataError, StorageError):
        return None, run.training.steps, None
    return {name: len(rows) for name, rows in found.items()}, loop.steps(run, found), measured


def _too_large(made: Report) -> str:
    row, gib = made.rows[0], 2**30
    held = row.need.total + (0 if made.device.cuda else row.need.host)
    said = (
        f"a worker needs {held / gib:.3g} GiB at its worst moment ({row.way}, micro-batch {made.run.micro_batch}); "
        f"of the {made.device.memory / gib:.3g} GiB of {made.device.name} {plan.USABLE:.0%} can be used: "
    )
    if made.advice is None:
        return said + "nothing that can be set here makes it fit; take more or larger devices, or fewer workers a machine"
    return said + f"add {' '.join(made.change())}"
