"""Which strategies to run fit into a device's memory, how large their micro-batches may be, and which one to take."""

import functools
from dataclasses import dataclass, replace

from unlearn import config
from unlearn.methods import base as methods
from unlearn.models import base
from unlearn.planning import footprint, memory
from unlearn.planning.footprint import Footprint
from unlearn.planning.memory import MemoryEstimate, Strategy

# Of a device's memory: the rest is for its context, for communication, and for holes between the allocations.
USABLE = 0.9
# Rows of a micro-batch below which a GPU has too little to do: then rather share or recompute more.
ENOUGH = 8
# From the quickest to the one that takes the least memory.
STRATEGIES = [
    Strategy(2), Strategy(3), Strategy(2, checkpointing=True), Strategy(3, checkpointing=True),
    Strategy(2, offload=True, checkpointing=True), Strategy(3, offload=True, checkpointing=True),
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One strategy: what a worker needs at the config's micro-batch, whether that fits, and the largest micro-batch that does (or 0)."""

    strategy: Strategy
    estimate: MemoryEstimate
    fits: bool
    largest: int


class Search:
    """For one run, and workers of `size` bytes of memory each. cuda: they are GPUs, and offloaded bytes lie elsewhere.

    caches: bytes of a worker's caches on the host. options: the model's shape, where it is known already.
    """

    def __init__(
        self, run: config.RunConfig, size: int, cuda: bool, caches: int = 0, options: base.ModelOptions | None = None
    ):
        self.run, self.size, self.cuda, self.caches = run, size, cuda, caches
        self.usable = int(USABLE * size)
        self._measured = functools.cache(
            lambda rows, precision, checkpointing: footprint.measure(run, rows, precision, checkpointing, options)
        )

    @property
    def rows(self) -> int:
        """Rows of a global batch that one worker computes."""
        return self.run.training.batch_size // self.run.cluster.workers

    def row(self, strategy: Strategy) -> Row:
        needed = self.estimate(strategy, self.run.micro_batch)
        return Row(strategy, needed, self._fits(needed), self.largest(strategy))

    def table(self) -> list[Row]:
        """The strategy the config asks for first, then its neighbours: every ZeRO stage, and with offload where the config has it."""
        asked = memory.strategy(self.run)
        others = [Strategy(stage, False, asked.checkpointing) for stage in range(4)]
        others += (
            [Strategy(stage, True, asked.checkpointing) for stage in (1, 2, 3)] if self.cuda or asked.offload else []
        )
        return [self.row(strategy) for strategy in (asked, *(other for other in others if other != asked))]

    def estimate(self, strategy: Strategy, micro_batch: int) -> MemoryEstimate:
        """What a worker needs. A micro-batch's allocations grow with its rows, so two sizes tell of all."""
        asked, precision = self.run.micro_batch, memory.precision(self.run, strategy)
        first = self._measured(asked, precision, strategy.checkpointing)
        if micro_batch != asked:
            first = _scaled(first, self._measured(2 * asked, precision, strategy.checkpointing), micro_batch / asked)
        workers = 1 if strategy.stage is None else self.run.cluster.workers
        return memory.estimate(first, strategy, precision, workers, max(1, self.rows // micro_batch), self.cuda)

    def largest(self, strategy: Strategy) -> int:
        """The largest micro-batch that fits, of those that divide a worker's rows; 0 where none does."""
        asked, least = (
            self.run.micro_batch,
            2 if methods.method_class(self.run.method.name).needs_forget and self.run.training.forget_fraction else 1,
        )
        whole = self._fits(self.estimate(strategy, asked))
        sizes = [n for n in range(least, self.rows + 1) if self.rows % n == 0 and (n > asked if whole else n < asked)]
        found, low, high = asked if whole else 0, 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            if self._fits(self.estimate(strategy, sizes[middle])):
                found, low = sizes[middle], middle + 1
            else:
                high = middle
        return found

    def advice(self) -> tuple[Strategy, int] | None:
        """(strategy, micro-batch) to take, or None where nothing fits. What the config asks for stays where it can."""
        asked = memory.strategy(self.run)
        plain = [Strategy(None), Strategy(None, checkpointing=True)] if asked.stage is None else []
        strategies = [asked, *plain, *STRATEGIES]
        enough = min(self.run.micro_batch, ENOUGH)
        for least in (self.run.micro_batch, enough, 1):
            for strategy in strategies:
                if (found := self.largest(strategy)) >= least:
                    # A GPU is the busier the more it gets at once; a CPU is not.
                    return strategy, found if self.cuda and strategy != asked else min(found, self.run.micro_batch)
        return None

    def starting(self) -> int:
        """Bytes of host memory that a worker takes while it starts: the student, and a teacher that is being filled from a file."""
        found = self._measured(
            self.run.micro_batch,
            memory.precision(self.run, memory.strategy(self.run)),
            memory.strategy(self.run).checkpointing,
        )
        models = 2 if self.run.model.weights else 1
        return (4 * found.trained.count if found.teacher.count else 0) + models * found.whole

    def _fits(self, needed: MemoryEstimate) -> bool:
        held = needed.total if self.cuda else max(needed.total + needed.host + self.caches, self.starting())
        return held <= self.usable


def settings(strategy: Strategy, micro_batch: int) -> dict[str, object]:
    """A strategy as values of a config."""
    found: dict[str, object] = {"training.engine": "torch" if strategy.stage is None else "deepspeed"}
    if strategy.stage is not None:
        found |= {"training.zero_stage": strategy.stage, "training.offload_optimizer": strategy.offload}
    return found | {
        "training.activation_checkpointing": strategy.checkpointing,
        "training.micro_batch_size": micro_batch,
    }


def _scaled(first: Footprint, second: Footprint, factor: float) -> Footprint:
    """The footprint of `factor` times the rows of the first; the second has twice as many."""
    growth = second.curve - first.curve
    return replace(first, curve=(first.curve + growth * (factor - 1)).astype(first.curve.dtype))
