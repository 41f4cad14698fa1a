"""The order of samples: pure functions of (rows, seed, position). No state, no workers, no files.

A set of rows is an endless sequence: pass after pass, each a fresh permutation. Micro-batch m takes the next `count`
positions, and a global batch is a run of consecutive micro-batches dealt to the workers in turn. So the global batches
are the same for any number of workers, and a run goes on anywhere from its step alone.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def shuffle(starts: np.ndarray, count: int, window: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of range(count) that touches few row groups at a time: (count,) int32, or int64 where that is too
    small.

    starts: place of the first row of each row group, ascending from 0. Row groups come in random order, and rows are
    shuffled within runs of whole row groups of about `window` rows; a window of all rows is a full shuffle.
    """
    # In place and in small numbers: a set of millions of rows is shuffled with nothing else of its length in memory.
    kind = np.int32 if count < 1 << 31 else np.int64
    places = np.arange(count, dtype=kind)
    if window >= count:
        rng.shuffle(places)
        return places
    turn = rng.permutation(len(starts))
    lengths = np.diff(starts, append=count)[turn]
    ends = np.cumsum(lengths)
    places += np.repeat((starts[turn] - ends + lengths).astype(kind), lengths)
    runs = ends[np.flatnonzero(np.diff(ends // window, prepend=0))]
    for first, last in zip([0, *runs], [*runs, count], strict=True):
        rng.shuffle(places[first:last])
    return places


@dataclass(frozen=True, eq=False)
class Stream:
    """The endless sequence of one set. rows: (n,) ascending; starts: place in it of the first row of each row group;
    name: mixes into the seed."""

    rows: np.ndarray
    starts: np.ndarray
    seed: int
    name: int
    window: int
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def take(self, start: int, count: int) -> np.ndarray:
        """Rows at positions start .. start + count."""
        n, parts = len(self.rows), []
        while count:
            epoch, offset = divmod(start, n)
            with self._lock:  # threads that begin an epoch together shuffle it once
                permutation = self._permutation(epoch)
            part = permutation[offset : offset + count]
            parts.append(self.rows[part])
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else self.rows[:0]

    @cached_property
    def _permutation(self) -> Callable[[int], np.ndarray]:
        """(epoch) -> its permutation. The last two are kept: batches are made ahead over the end of an epoch."""
        return lru_cache(2)(
            lambda epoch: shuffle(self.starts, len(self.rows), self.window, generator(self.seed, self.name, epoch))
        )


def micro_batches(step: int, rank: int, workers: int, per_step: int) -> range:
    """Numbers of the micro-batches that a worker computes in a step; `per_step` of them make a global batch."""
    return range(step * per_step + rank, (step + 1) * per_step, workers)


def split(micro_batch: int, forget_fraction: float) -> tuple[int, int]:
    """(retain rows, forget rows) of every micro-batch: at least one of each where any forget row is wanted."""
    if forget_fraction == 0:
        return micro_batch, 0
    forget = min(max(round(micro_batch * forget_fraction), 1), micro_batch - 1)
    return micro_batch - forget, forget
