"""Chosen rows of one folder of shards."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unlearn.data.manifest import Manifest


@dataclass(frozen=True)
class RowSet:
    """Rows of one folder of shards: `rows` (n,) ascending row numbers, `labels` (n,), both int32, or int64 where that
    is too small; labels -1 where none.

    ids_file: sha256 of the file of ids by which they were chosen; empty where there is none.
    """

    manifest: Manifest
    rows: np.ndarray
    labels: np.ndarray
    ids_file: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def groups(self) -> np.ndarray:
        return self.manifest.group_of(self.rows)

    @property
    def touched(self) -> np.ndarray:
        """The row groups that hold a row of the set, ascending."""
        kind = self.rows.dtype
        starts = self.manifest.starts.clip(max=np.iinfo(kind).max).astype(kind)
        return np.flatnonzero(np.diff(np.searchsorted(self.rows, starts)))

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
            manifest=state["manifest"], rows=small(rows), labels=small(state["labels"]), ids_file=state["ids_file"]
        )


def small(values: np.ndarray) -> np.ndarray:
    """The same integers, of 32 bits where they fit: a set of millions of rows is held for the whole of a run."""
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return values.astype(np.int32 if -(1 << 31) <= least and most < (1 << 31) - 1 else np.int64, copy=False)


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same integers in the smallest type that fits them."""
    if not len(values):
        return values
    return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))
