"""The order of samples: pure functions of (rows, seed, position). No state, no workers, no files.

A set of rows is an endless sequence: pass after pass, each a fresh permutation. Micro-batch m takes the next `count`
positions, and a global batch is a run of consecutive micro-batches dealt to the workers in turn. So the global batches
are the same for any number of workers, and a run goes on anywhere from its step alone.
"""

import functools
from dataclasses import dataclass

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def shuffle(groups: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of range(len(groups)) that touches few row groups at a time.

    groups: the row group of each row, ascending. Row groups come in random order, and rows are shuffled within runs of
    whole row groups of about `window` rows; a window of all rows is a full shuffle.
    """
    if window >= len(groups):
        return rng.permutation(len(groups))
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    blocks = np.split(np.arange(len(groups)), starts[1:])
    blocks = [blocks[i] for i in rng.permutation(len(blocks))]
    ends = np.cumsum([len(b) for b in blocks])
    runs = np.split(np.concatenate(blocks), ends[np.flatnonzero(np.diff(ends // window, prepend=0))])
    return np.concatenate([rng.permutation(run) for run in runs])


@dataclass(frozen=True)
class Stream:
    """The endless sequence of one set. rows: (n,) ascending; groups: (n,) the row group of each; name: mixes into the
    seed."""

    rows: np.ndarray
    groups: np.ndarray
    seed: int
    name: int
    window: int

    def take(self, start: int, count: int) -> np.ndarray:
        """Rows at positions start .. start + count."""
        n, parts = len(self.rows), []
        while count:
            epoch, offset = divmod(start, n)
            part = _permutation(self, epoch)[offset : offset + count]
            parts.append(self.rows[part])
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else self.rows[:0]

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@functools.lru_cache(maxsize=8)
def _permutation(stream: Stream, epoch: int) -> np.ndarray:
    return shuffle(stream.groups, stream.window, generator(stream.seed, stream.name, epoch))


def micro_batches(step: int, rank: int, workers: int, per_step: int) -> range:
    """Numbers of the micro-batches that a worker computes in a step; `per_step` of them make a global batch."""
    return range(step * per_step + rank, (step + 1) * per_step, workers)


def split(micro_batch: int, forget_fraction: float) -> tuple[int, int]:
    """(retain rows, forget rows) of every micro-batch: at least one of each where any forget row is wanted."""
    if forget_fraction == 0:
        return micro_batch, 0
    forget = min(max(round(micro_batch * forget_fraction), 1), micro_batch - 1)
    return micro_batch - forget, forget
