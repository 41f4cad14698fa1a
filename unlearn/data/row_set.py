"""Chosen rows of one folder of shards."""

import hashlib
from dataclasses import dataclass

import numpy as np

from unlearn.data.manifest import Manifest


@dataclass(frozen=True)
class RowSet:
    """Rows of one folder of shards: `rows` (n,) ascending row numbers, int32, or int64 where that is too small;
    `labels` (n,) in the smallest signed integers that hold all of them, -1 where there are none.

    ids_file: sha256 of the file of ids by which they were chosen; empty where there is none.
    """

    manifest: Manifest
    rows: np.ndarray
    labels: np.ndarray
    ids_file: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """The hash of which rows of which data these are."""
        return hashlib.sha256(self.manifest.hash.encode() + self.rows.astype("<i8").tobytes()).hexdigest()

    @property
    def counts(self) -> np.ndarray:
        """How many rows of the set each row group of the manifest holds."""
        return np.diff(self._places)

    @property
    def touched(self) -> np.ndarray:
        """The row groups that hold a row of the set, ascending."""
        return np.flatnonzero(self.counts)

    @property
    def starts(self) -> np.ndarray:
        """The place in `rows` of the first row of each row group of `touched`."""
        return self._places[self.touched]

    @property
    def _places(self) -> np.ndarray:
        """The place in `rows` of the first row of each row group of the manifest, and at the end their number."""
        kind = self.rows.dtype  # else all rows were copied into a wider type
        return np.searchsorted(self.rows, self.manifest.starts.clip(max=np.iinfo(kind).max).astype(kind))

    def __getstate__(self) -> dict:
        """What is pickled: the steps from row to row and the labels, in the smallest integer types that fit."""
        steps = _narrow(np.diff(self.rows))
        return {
            "manifest": self.manifest, "first": self.rows[:1], "steps": steps, "labels": _narrow(self.labels),
            "ids_file": self.ids_file,
        }  # fmt: skip

    def __setstate__(self, state: dict) -> None:
        rows = np.cumsum(np.concatenate([state["first"], state["steps"]]), dtype=np.int64)
        self.__dict__.update(
            manifest=state["manifest"], rows=small(rows), labels=narrow(state["labels"]), ids_file=state["ids_file"]
        )


def small(values: np.ndarray) -> np.ndarray:
    """The same integers, of 32 bits where they fit: a set of millions of rows is held for the whole of a run."""
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return values.astype(np.int32 if -(1 << 31) <= least and most < (1 << 31) - 1 else np.int64, copy=False)


def narrow(values: np.ndarray) -> np.ndarray:
    """The same integers in the smallest signed type that holds them."""
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    kinds = (np.int8, np.int16, np.int32, np.int64)
    return values.astype(next(kind for kind in kinds if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max))


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same integers in the smallest type that fits them, without a sign where none is negative."""
    if not len(values):
        return values
    return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))
