"""Which strategies to run fit into a device's memory, how large their micro-batches may be, and which one to take."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from unlearn import config
from unlearn.methods import base as methods
from unlearn.models import base
from unlearn.planning import footprint, memory
from unlearn.planning.footprint import Footprint
from unlearn.planning.memory import MemoryEstimate, Strategy

# Usable share of a device's memory: the rest is for its context, communication and fragmentation.
USABLE = 0.9
# Below this many rows in a micro-batch a GPU is underused: sharding or recomputing more is preferred then.
ENOUGH = 8
# From the quickest to the one that takes the least memory.
STRATEGIES = [
    Strategy(2), Strategy(3), Strategy(2, checkpointing=True), Strategy(3, checkpointing=True),
    Strategy(2, offload=True, checkpointing=True), Strategy(3, offload=True, checkpointing=True),
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One strategy: what a worker needs at the config's micro-batch, whether that fits, and the largest micro-batch
    that does (or 0)."""

    strategy: Strategy
    estimate: MemoryEstimate
    fits: bool
    largest: int


class Search:
    """For one run, and workers of `size` bytes of memory each. cuda: they are GPUs, and offloaded bytes are in host
    memory.

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
        """The strategy the config asks for first, then its neighbours: every ZeRO stage, and with offload where the
        config has it."""
        asked = memory.strategy(self.run)
        others = [Strategy(stage, False, asked.checkpointing) for stage in range(4)]
        others += (
            [Strategy(stage, True, asked.checkpointing) for stage in (1, 2, 3)] if self.cuda or asked.offload else []
        )
        return [
            self.row(strategy) for strategy in (asked, *(other for other in self._possible(others) if other != asked))
        ]

    def _possible(self, strategies: Iterable[Strategy]) -> list[Strategy]:
        """Those of the strategies that the method can be trained with: gradients apart need a stage below 3."""
        apart = methods.method_class(self.run.method.name).gradients_apart
        return [strategy for strategy in strategies if not (apart and strategy.stage == 3)]

    def estimate(self, strategy: Strategy, micro_batch: int) -> MemoryEstimate:
        """What a worker needs. Allocations grow linearly with the rows of a micro-batch, so two sizes determine all
        others."""
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
        best, low, high = asked if whole else 0, 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            if self._fits(self.estimate(strategy, sizes[middle])):
                best, low = sizes[middle], middle + 1
            else:
                high = middle
        return best

    def advice(self) -> tuple[Strategy, int] | None:
        """(strategy, micro-batch) to take, or None where nothing fits. The settings of the config are kept where they
        fit."""
        asked = memory.strategy(self.run)
        plain = [Strategy(None), Strategy(None, checkpointing=True)] if asked.stage is None else []
        strategies = self._possible([asked, *plain, *STRATEGIES])
        enough = min(self.run.micro_batch, ENOUGH)
        for least in (self.run.micro_batch, enough, 1):
            for strategy in strategies:
                if (largest := self.largest(strategy)) >= least:
                    # A GPU is used better by larger micro-batches; a CPU is not.
                    return strategy, largest if self.cuda and strategy != asked else min(largest, self.run.micro_batch)
        return None

    def starting(self) -> int:
        """Bytes of host memory that a worker takes while it starts: the student, and a teacher that is being filled
        from a file."""
        measured = self._measured(
            self.run.micro_batch,
            memory.precision(self.run, memory.strategy(self.run)),
            memory.strategy(self.run).checkpointing,
        )
        models = 2 if self.run.model.weights else 1
        return (4 * measured.trained.count if measured.teacher.count else 0) + models * measured.whole

    def _fits(self, needed: MemoryEstimate) -> bool:
        total = needed.total if self.cuda else max(needed.total + needed.host + self.caches, self.starting())
        return total <= self.usable


def settings(strategy: Strategy, micro_batch: int) -> dict[str, object]:
    """A strategy as values of a config."""
    values: dict[str, object] = {"training.engine": "torch" if strategy.stage is None else "deepspeed"}
    if strategy.stage is not None:
        values |= {"training.zero_stage": strategy.stage, "training.offload_optimizer": strategy.offload}
    return values | {
        "training.activation_checkpointing": strategy.checkpointing,
        "training.micro_batch_size": micro_batch,
    }


def _scaled(first: Footprint, second: Footprint, factor: float) -> Footprint:
    """The footprint of `factor` times the rows of the first; the second has twice as many."""
    growth = second.curve - first.curve
    return replace(first, curve=(first.curve + growth * (factor - 1)).astype(first.curve.dtype))
