"""What a manifest knows of row groups. They are kept in one array, of about 110 bytes each: Python objects take
twenty times as much, and large sets have many thousands of them."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self, overload

import numpy as np
import pyarrow as pa

from unlearn.data.columns import ROLES

DIGEST, CHECK = 32, 8  # bytes of a sha256, and of the checksum of a column
_NUMBERS = ("rows", "offset", "bytes", "min_label", "max_label")
_CHECKS = tuple(f"check_{role}" for role in ROLES)
_CHECKED = tuple(f"checked_{role}" for role in ROLES)  # whether there is such a checksum
_FACTS = np.dtype(
    [
        *((name, "i8") for name in _NUMBERS),
        ("sha256", f"V{DIGEST}"),
        *((name, f"V{CHECK}") for name in _CHECKS),
        *((name, "?") for name in _CHECKED),
    ]
)
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.int64()) for name in _NUMBERS),
        pa.field("sha256", pa.binary(DIGEST)),
        *(pa.field(name, pa.binary(CHECK)) for name in _CHECKS),  # null where there is none
    ]
)


@dataclass(frozen=True)
class RowGroup:
    """One row group: its rows, its bytes in the file, the smallest and largest label ((0, -1) without rows), sha256 of
    those bytes.

    checks: {role: checksum of the values of the column} as `columns.checksum` gives it; none in older manifests.
    """

    rows: int
    offset: int
    bytes: int
    labels: tuple[int, int]
    sha256: str
    checks: dict[str, str] = field(default_factory=dict)


class RowGroups(Sequence[RowGroup]):
    """Row groups in their order. facts: array (n,) with `rows`, `offset`, `bytes`, `min_label` and `max_label`, int64,
    and their checksums."""

    def __init__(self, facts: np.ndarray):
        self.facts = facts

    @classmethod
    def of(cls, groups: Iterable[RowGroup]) -> Self:
        """Raises ValueError for a checksum that is none, OverflowError for a number over 63 bits."""
        return cls(np.array([_facts(group) for group in groups], _FACTS))

    @classmethod
    def of_table(cls, table: pa.Table) -> Self:
        """From a table with the columns of SCHEMA. Raises ValueError where a value is missing."""
        facts = np.zeros(len(table), _FACTS)
        for name in (*_NUMBERS, "sha256"):
            if table[name].null_count:
                raise ValueError(f"a row group without {name}")
        for name in (*_NUMBERS, "sha256", *_CHECKS):
            facts[name] = _values(table[name], _FACTS[name])
        for check, checked in zip(_CHECKS, _CHECKED, strict=True):
            facts[checked] = table[check].is_valid().to_pylist()
            facts[check][~facts[checked]] = bytes(CHECK)
        return cls(facts)

    def table(self) -> pa.Table:
        """With the columns of SCHEMA."""
        columns = {name: pa.array(self.facts[name]) for name in _NUMBERS}
        columns["sha256"] = pa.array(self.facts["sha256"].tolist(), pa.binary(DIGEST))
        for check, checked in zip(_CHECKS, _CHECKED, strict=True):
            columns[check] = pa.array(self.facts[check].tolist(), pa.binary(CHECK), mask=~self.facts[checked])
        return pa.table(columns, SCHEMA)

    def __len__(self) -> int:
        return len(self.facts)

    @overload
    def __getitem__(self, index: int) -> RowGroup: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> RowGroup | Self:
        if isinstance(index, slice):
            return type(self)(self.facts[index])
        return _row_group(self.facts[operator.index(index)].item())

    def __iter__(self) -> Iterator[RowGroup]:
        return map(_row_group, self.facts.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowGroups) and self.facts.tobytes() == other.facts.tobytes()

    def __repr__(self) -> str:
        return f"RowGroups({list(self)})"


def _values(column: pa.ChunkedArray, kind: np.dtype) -> np.ndarray:
    """The values of a column of fixed width; anything where one is null. `to_numpy` would import pandas for it."""
    chunks = [(chunk.buffers()[1], len(chunk), chunk.offset * kind.itemsize) for chunk in column.chunks if len(chunk)]
    return np.concatenate([np.empty(0, kind), *(np.frombuffer(data, kind, *of) for data, *of in chunks)])


def _facts(group: RowGroup) -> tuple:
    digest, checks = bytes.fromhex(group.sha256), [bytes.fromhex(group.checks.get(role, "")) for role in ROLES]
    if len(digest) != DIGEST or {len(check) for check in checks} - {0, CHECK} or group.checks.keys() - {*ROLES}:
        raise ValueError("a row group whose checksums are none")
    numbers = group.rows, group.offset, group.bytes, *group.labels
    return *numbers, digest, *(check or bytes(CHECK) for check in checks), *(bool(check) for check in checks)


def _row_group(facts: tuple) -> RowGroup:
    rows, offset, size, least, most, digest, *checks = facts
    found = zip(ROLES, checks[: len(ROLES)], checks[len(ROLES) :], strict=True)
    known = {role: check.hex() for role, check, checked in found if checked}
    return RowGroup(rows, offset, size, (least, most), digest.hex(), known)
