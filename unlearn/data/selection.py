"""Which rows are the forget, the retain and the proxy set."""

# pyarrow makes the functions of pyarrow.compute at import, so pyright knows none of them.
# pyright: reportAttributeAccessIssue=false

import logging
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn import config
from unlearn.data import classes, duplicates, id_file, order, shards
from unlearn.data.row_set import RowSet
from unlearn.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wanted:
    """One set to be selected. labels, unwanted: of classes (labels None: any); columns, groups: what to read for it;
    listed: the ids of its file, where it is given by one."""

    manifest: shards.Manifest
    conditions: config.Rows
    what: str
    labels: set[int] | None
    unwanted: set[int]
    columns: set[str]
    groups: set[int]
    listed: id_file.Ids | None


def select(manifest: shards.Manifest, rows: config.Rows, seed: int, what: str) -> RowSet:
    """The rows that meet every condition. `what` names the set in messages.

    Raises ConfigError for a class, id or subject that the shards do not have, and for an empty set.
    """
    return _select([_wanted(manifest, rows, what)], seed)[0][0]


def sets(data: config.Data, seed: int) -> dict[str, RowSet]:
    """{"retain": ..., "forget": ...} as training takes them; a proxy set takes the retain role.

    A config without `retain` and `proxy` retains every row that is not forgotten. Each shard is opened once at most.
    Raises ConfigError on an overlap.
    """
    manifest = shards.load(data.train, data.split)
    wanted: dict[str, _Wanted] = {}
    if data.forget is not None:
        wanted["forget"] = _wanted(manifest, data.forget, "forget")
    if data.proxy is not None:
        same = (data.proxy_data or data.train, data.proxy_split or data.split) == (data.train, data.split)
        other = manifest if same else shards.load(data.proxy_data or data.train, data.proxy_split)
        _no_foreign_number(data.proxy, other, manifest)
        wanted["retain"] = _wanted(other, data.proxy, "proxy")
    else:
        wanted["retain"] = _wanted(manifest, data.retain or config.Rows(), "retain")
    if "forget" in wanted and all("id" in one.manifest.columns for one in wanted.values()):
        for one in wanted.values():  # to find images that are in both sets
            one.columns.add("id")
    chosen = _select(list(wanted.values()), seed)
    row_sets = {name: rows for name, (rows, _) in zip(wanted, chosen, strict=True)}
    ids = {name: column for name, (_, column) in zip(wanted, chosen, strict=True)}
    if data.forget is not None and data.proxy is None and data.retain is None:
        every = row_sets["retain"]
        keep = ~np.isin(every.rows, row_sets["forget"].rows)
        if not keep.any():
            raise ConfigError(
                "data.forget selects every image: nothing is left to retain; give data.retain or data.proxy"
            )
        row_sets["retain"] = replace(every, rows=every.rows[keep], labels=every.labels[keep])
        ids["retain"] = ids["retain"].filter(pa.array(keep)) if ids["retain"] is not None else None
    _no_overlap(row_sets)
    if "forget" in row_sets:
        row_sets["retain"] = _without_forgotten(row_sets, ids)
    return row_sets


def _without_forgotten(row_sets: dict[str, RowSet], ids: dict[str, pa.ChunkedArray | None]) -> RowSet:
    """The retain set without images that are also in the forget set under another row number, compared by id and by
    bytes."""
    forget, retain = row_sets["forget"], row_sets["retain"]
    twice = np.zeros(len(retain), bool)
    if ids["forget"] is not None and ids["retain"] is not None:
        twice = pc.is_in(ids["retain"], ids["forget"].combine_chunks()).to_numpy().astype(bool)
    by_id = int(twice.sum())
    twice |= duplicates.in_both((forget.manifest, forget.rows), (retain.manifest, retain.rows))
    if not twice.any():
        return retain
    what = (
        f"{twice.sum()} of {len(retain)} retain images are forget images too ({by_id} by id, "
        f"{twice.sum() - by_id} by their bytes alone)"
    )
    if twice.all():
        log.warning("data: %s: they stay in the retain set, which would be empty without them", what)
        return retain
    log.warning("data: %s: they are kept out of the retain set", what)
    return replace(retain, rows=retain.rows[~twice], labels=retain.labels[~twice])


def _no_foreign_number(rows: config.Rows, other: shards.Manifest, train: shards.Manifest) -> None:
    """Raises ConfigError where a proxy class is given by a number that means another class in `train`."""
    for number in (c for c in (*(rows.classes or ()), *(rows.exclude_classes or ())) if not isinstance(c, str)):
        if other.classes and train.classes and other.class_name(number) != train.class_name(number):
            raise ConfigError(
                f"data.proxy: label {number} is {other.class_name(number)!r} in {other.uri} and "
                f"{train.class_name(number)!r} in {train.uri}; give the class by its name"
            )


def _wanted(manifest: shards.Manifest, rows: config.Rows, what: str) -> _Wanted:
    """Checks the conditions against the manifest; reads no shard. Raises ConfigError."""
    spans = _spans(manifest)
    span = _span(spans)
    if "label" not in manifest.columns and (
        rows.classes is not None or rows.exclude_classes is not None or rows.per_class is not None
    ):
        raise ConfigError(f"data.{what}: the shards at {manifest.uri} have no labels; choose rows by ids or subjects")
    labels = (
        None
        if rows.classes is None
        else {classes.label(manifest, span, c, f"data.{what}.classes") for c in rows.classes}
    )
    unwanted = {classes.label(manifest, span, c, f"data.{what}.exclude_classes") for c in rows.exclude_classes or ()}
    columns = {"label"} & set(manifest.columns)
    listed = id_file.read(rows.ids_from, rows.ids_column, f"data.{what}.ids_from") if rows.ids_from else None
    if (rows.ids is not None or listed) and "id" in manifest.columns:
        columns.add("id")
    if rows.subjects is not None:
        if "subject" not in manifest.columns:
            raise ConfigError(f"data.{what}.subjects: the shards at {manifest.uri} have no column `subject`")
        columns.add("subject")
    groups = np.flatnonzero(np.diff(manifest.starts))
    if labels is not None:  # only row groups whose label range can hold one of the labels
        ordered = np.array(sorted(labels))
        low, high = np.searchsorted(ordered, spans[:, 0]), np.searchsorted(ordered, spans[:, 1], side="right")
        groups = groups[low < high]
    return _Wanted(manifest, rows, what, labels, unwanted, columns, set(groups.tolist()), listed)


def label(manifest: shards.Manifest, value: int | str, where: str) -> int:
    """The label of a class by its name or label. Raises ConfigError where there is no such class, or several."""
    return classes.label(manifest, _span(_spans(manifest)), value, where)


def _spans(manifest: shards.Manifest) -> np.ndarray:
    """(n, 2): the smallest and the largest label of each row group that has rows."""
    spans = np.array([manifest.shards[s].row_groups[g].labels for s, g in manifest.groups]).reshape(-1, 2)
    return spans[np.diff(manifest.starts) > 0].astype(np.int64)


def _span(spans: np.ndarray) -> tuple[int, int]:
    return (int(spans[:, 0].min()), int(spans[:, 1].max())) if len(spans) else (0, -1)


def _select(wanted: list[_Wanted], seed: int) -> list[tuple[RowSet, pa.ChunkedArray | None]]:
    """(rows, their ids where the set needs that column) for each set; sets of the same manifest are read together."""
    columns: dict[int, set[str]] = {}
    groups: dict[int, set[int]] = {}
    for one in wanted:
        columns.setdefault(id(one.manifest), set()).update(one.columns)
        groups.setdefault(id(one.manifest), set()).update(one.groups)
    manifests = {id(one.manifest): one.manifest for one in wanted}
    tables = {key: manifest.table(sorted(columns[key]), sorted(groups[key])) for key, manifest in manifests.items()}
    return [_chosen(one, tables[id(one.manifest)], seed) for one in wanted]


def _chosen(wanted: _Wanted, table: pa.Table, seed: int) -> tuple[RowSet, pa.ChunkedArray | None]:
    """The rows of a table that meet the conditions; it may hold rows of other labels, and more columns."""
    rows, what = wanted.conditions, wanted.what
    if "label" not in table.column_names:
        table = table.append_column("label", pa.array(np.full(len(table), -1)))
    if rows.ids is not None or wanted.listed:
        own = table["id"] if "id" in table.column_names else pa.array(identity(wanted.manifest, table), pa.string())
        table = table.append_column("key", own)
    table = _only(table, "label", wanted.labels, None)
    if wanted.unwanted:
        table = table.filter(pc.invert(pc.is_in(table["label"], pa.array(sorted(wanted.unwanted)))))
    table = _only(table, "key", rows.ids, f"data.{what}.ids")
    if wanted.listed:
        table = _of_list(table, wanted.listed.values, f"data.{what}.ids_from: {rows.ids_from}")
    table = _only(table, "subject", rows.subjects, f"data.{what}.subjects")
    chosen, labels = table["row"].to_numpy(), table["label"].to_numpy()
    if rows.per_class is not None:
        keep = [_draw(np.flatnonzero(labels == c), rows.per_class, seed, int(c)) for c in np.unique(labels)]
        index = np.sort(np.concatenate(keep)) if keep else np.arange(0)
        table, chosen, labels = table.take(index), chosen[index], labels[index]
    if rows.limit is not None:
        index = _draw(np.arange(len(chosen)), rows.limit, seed, -1)
        table, chosen, labels = table.take(index), chosen[index], labels[index]
    if not len(chosen):
        raise ConfigError(
            f"data.{what} selects no image of {wanted.manifest.uri}: the {what} set is empty; widen its conditions"
        )
    ids = table["id"] if "id" in wanted.columns else None
    ids_file = wanted.listed.sha256 if wanted.listed else ""
    return RowSet(wanted.manifest, chosen.astype(np.int64), labels.astype(np.int64), ids_file), ids


def identity(manifest: shards.Manifest, table: pa.Table) -> list[str]:
    """The id of each row of a table that has `row`: its `id`, else `shard:row within the shard`."""
    if "id" in table.column_names:
        return table["id"].to_pylist()
    rows = table["row"].to_numpy()
    # A shard may have no row group at all, so the shard of a row is found through its row group, never by counting.
    firsts = {s: int(manifest.starts[i]) for i, (s, g) in enumerate(manifest.groups) if g == 0}
    which = [manifest.groups[i][0] for i in manifest.group_of(rows)]
    return [f"{manifest.shards[s].path}:{row - firsts[s]}" for s, row in zip(which, rows.tolist(), strict=True)]


def name_row(manifest: shards.Manifest, row: int) -> str:
    """The id of one row, for messages."""
    group = int(manifest.group_of(np.array([row]))[0])
    table = manifest.table(["id"] if "id" in manifest.columns else [], [group])
    return identity(manifest, table)[row - int(manifest.starts[group])]


def _place(manifest: shards.Manifest, row: int) -> str:
    """Where a row lies, for messages that may be logged: unlike its id it tells nothing of a person."""
    group = int(manifest.group_of(np.array([row]))[0])
    s, g = manifest.groups[group]
    return f"row {row - int(manifest.starts[group])} of row group {g} of {manifest.shards[s].path}"


def _no_overlap(row_sets: dict[str, RowSet]) -> None:
    if len(row_sets) < 2 or row_sets["forget"].manifest.hash != row_sets["retain"].manifest.hash:
        return
    both = np.intersect1d(row_sets["forget"].rows, row_sets["retain"].rows)
    if len(both):
        manifest = row_sets["forget"].manifest
        raise ConfigError(
            f"data: forget and retain overlap in {len(both)} image(s), for example {_place(manifest, int(both[0]))}; "
            "an image can only be in one of them"
        )


def _only(table: pa.Table, column: str, values, where: str | None) -> pa.Table:
    if values is None:
        return table
    matching = table.filter(pc.is_in(table[column], pa.array(sorted(values), table[column].type)))
    if where:
        found = set(matching[column].to_pylist())
        # Ids and subjects are personal, and a message may be logged: which of the list it is, not what it says.
        if missing := [place for place, value in enumerate(values, 1) if value not in found]:
            raise ConfigError(
                f"{where}: {len(missing)} of {len(values)} not found, for example number {missing[0]} of the list"
            )
    return matching


def _of_list(table: pa.Table, ids: pa.Array, where: str) -> pa.Table:
    """The rows whose `key` is one of a file's ids; what matches nothing is counted, and none of it told: it is
    personal."""
    matching = table.filter(pc.is_in(table["key"], ids))
    found = len(pc.unique(matching["key"]))
    if not found:
        raise ConfigError(
            f"{where}: none of its {len(ids)} ids is a row of these shards and conditions: check ids_column, and that "
            "the ids are written as the shards have them"
        )
    if found < len(ids):
        log.warning("%s: %d of %d ids match no row, and are left out", where, len(ids) - found, len(ids))
    return matching


def _draw(index: np.ndarray, count: int, seed: int, name: int) -> np.ndarray:
    if len(index) <= count:
        return index
    return np.sort(order.generator(seed, 7, name & 0xFFFFFFFF).permutation(index)[:count])


def describe(row_sets: dict[str, RowSet]) -> dict[str, dict]:
    """Counts and classes (by name where they have one) of each set, for logs and reports: no id and no image."""
    return {
        name: {
            "images": len(s),
            "classes": [s.manifest.class_name(int(c)) for c in np.unique(s.labels) if c >= 0],
            "manifest": s.manifest.hash,
        }
        for name, s in row_sets.items()
    }
