"""The rows of one set, chosen from the values of all rows piece by piece."""

# pyarrow makes the functions of pyarrow.compute at import, so pyright knows none of them.
# pyright: reportAttributeAccessIssue=false

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn import config
from unlearn.data import id_file, order
from unlearn.data.manifest import Manifest
from unlearn.data.row_set import RowSet, narrow
from unlearn.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """One set to be chosen. labels, unwanted: of classes (labels None: any); columns, groups: what to read for it;
    listed: the ids of its file, where it is given by one."""

    manifest: Manifest
    conditions: config.Rows
    what: str
    labels: set[int] | None
    unwanted: set[int]
    columns: set[str]
    groups: set[int]
    listed: id_file.Ids | None

    @property
    def listed_ids(self) -> int:
        return len(self.listed.values) if self.listed else 0


class Labels:
    """The labels of a manifest's rows, put together from pieces: -1 of rows that were in none, or have none."""

    def __init__(self, manifest: Manifest):
        self.values = np.full(manifest.rows, -1, np.int8)

    def take(self, table: pa.Table) -> None:
        """A piece that may have labels."""
        if "label" in table.column_names and len(table):
            labels = narrow(table["label"].to_numpy())
            self.values = self.values.astype(np.promote_types(self.values.dtype, labels.dtype), copy=False)
            self.values[table["row"].to_numpy()] = labels


class Choosing:
    """Takes the rows that meet every condition out of each piece: a flag of a byte for each row of the manifest says
    whether it is one of them, so that millions take little memory until the set is made."""

    def __init__(self, wanted: Wanted):
        rows = wanted.conditions
        self.wanted, self._met = wanted, np.zeros(wanted.manifest.rows, bool)
        self._labelled = None if wanted.labels is None else pa.array(sorted(wanted.labels), pa.int64())
        self._unwanted = pa.array(sorted(wanted.unwanted), pa.int64())
        self._ids = _Named(rows.ids) if rows.ids is not None else None
        self._listed = _Named(wanted.listed.values) if wanted.listed else None
        self._subjects = _Named(rows.subjects) if rows.subjects is not None else None

    def take(self, table: pa.Table) -> None:
        """A piece, in the order of the rows. It may hold rows of other labels, and more columns."""
        if self._labelled is not None:
            table = table.filter(pc.is_in(table["label"], self._labelled))
        if len(self._unwanted):
            table = table.filter(pc.invert(pc.is_in(table["label"], self._unwanted)))
        for named in (self._ids, self._listed):
            if named is not None:
                ids = table["id"] if "id" in table.column_names else identity(self.wanted.manifest, table)
                table = named.only(table, ids)
        if self._subjects is not None:
            table = self._subjects.only(table, table["subject"])
        self._met[table["row"].to_numpy()] = True

    def leave_out(self, rows: RowSet) -> bool:
        """Take the rows of another set, of the same manifest, out of this one; whether any row is left."""
        self._met[rows.rows] = False
        return bool(self._met.any())

    def chosen(self, labels: Labels, seed: int) -> RowSet:
        """The rows of all pieces; `per_class` and `limit` are drawn by the seed. Raises ConfigError for an id or
        subject that no row has, and where no row is left."""
        wanted, where = self.wanted, f"data.{self.wanted.what}"
        rows = wanted.conditions
        _all_met(self._ids, rows.ids, f"{where}.ids")
        if self._listed is not None:
            _some_met(self._listed, f"{where}.ids_from: {rows.ids_from}")
        _all_met(self._subjects, rows.subjects, f"{where}.subjects")
        chosen = numbers(len(self._met))[self._met]
        if rows.per_class is not None:
            labels_of = labels.values[self._met]
            by_label = np.argsort(labels_of, kind="stable")
            classes, counts = np.unique(labels_of, return_counts=True)
            places = np.split(by_label, np.cumsum(counts)[:-1])
            keep = [_draw(p, rows.per_class, seed, int(c)) for c, p in zip(classes, places, strict=False)]
            chosen = chosen[np.sort(np.concatenate(keep))] if keep else chosen
        if rows.limit is not None:
            chosen = chosen[_draw(numbers(len(chosen)), rows.limit, seed, -1)]
        if not len(chosen):
            raise ConfigError(
                f"{where} selects no image of {wanted.manifest.uri}: the {wanted.what} set is empty; widen its "
                "conditions"
            )
        self._met[:] = False
        self._met[chosen] = True
        return RowSet(
            wanted.manifest, chosen, narrow(labels.values[self._met]), wanted.listed.sha256 if wanted.listed else ""
        )


class _Named:
    """Values of which a row is to have one, and which of them a row has had."""

    def __init__(self, values: Iterable[str] | pa.Array):
        self.values: pa.Array = values if isinstance(values, pa.Array) else pa.array(sorted(set(values)), pa.string())
        self.met = np.zeros(len(self.values), bool)

    def only(self, table: pa.Table, own: pa.ChunkedArray | list[str]) -> pa.Table:
        """The rows of a table whose own value is one of them."""
        own = pa.chunked_array([own], pa.string()) if isinstance(own, list) else own
        places = pc.index_in(own, self.values)
        self.met[pc.unique(places).drop_null().to_numpy()] = True
        return table.filter(places.is_valid())


def identity(manifest: Manifest, table: pa.Table) -> list[str]:
    """The id of each row of a table that has `row`: its `id`, else `shard:row within the shard`."""
    if "id" in table.column_names:
        return table["id"].to_pylist()
    rows = table["row"].to_numpy()
    # A shard may have no row group at all, so the shard of a row is found through its row group, never by counting.
    which, inner = manifest.groups[manifest.group_of(rows)].T
    firsts = manifest.starts[manifest.group_of(rows) - inner]
    within = zip(which.tolist(), (rows - firsts).tolist(), strict=True)
    return [f"{manifest.shards[s].path}:{row}" for s, row in within]


def _all_met(named: _Named | None, given: list[str] | None, where: str) -> None:
    """Raises ConfigError where a value that the configuration gives is no row's. Ids and subjects are personal, and a
    message may be logged: it says which of the list it is, not what it says."""
    if named is not None and given is not None and not named.met.all():
        missing = set(named.values.filter(pa.array(~named.met)).to_pylist())
        first = next(place for place, value in enumerate(given, 1) if value in missing)
        raise ConfigError(f"{where}: {len(missing)} of {len(given)} not found, for example number {first} of the list")


def _some_met(named: _Named, where: str) -> None:
    """Counts the ids of a file that match nothing; none of them is told: they are personal. Raises ConfigError where
    none does."""
    found, given = int(named.met.sum()), len(named.values)
    if not found:
        raise ConfigError(
            f"{where}: none of its {given} ids is a row of these shards and conditions: check ids_column, and that the "
            "ids are written as the shards have them"
        )
    if found < given:
        log.warning("%s: %d of %d ids match no row, and are left out", where, given - found, given)


def numbers(count: int) -> np.ndarray:
    """0, 1, ... count - 1."""
    return np.arange(count, dtype=np.int32 if count < 1 << 31 else np.int64)


def _draw(index: np.ndarray, count: int, seed: int, name: int) -> np.ndarray:
    """So many of `index`, ascending; it may be shuffled in place."""
    if len(index) <= count:
        return index
    order.generator(seed, 7, name & 0xFFFFFFFF).shuffle(index)
    return np.sort(index[:count])
