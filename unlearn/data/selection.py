"""Which rows are the forget, the retain and the proxy set."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn import config
from unlearn.data import order, shards
from unlearn.errors import ConfigError


@dataclass(frozen=True)
class RowSet:
    """Rows of one folder of shards: `rows` (n,) ascending row numbers, `labels` (n,)."""

    manifest: shards.Manifest
    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def groups(self) -> np.ndarray:
        return self.manifest.group_of(self.rows)


def select(manifest: shards.Manifest, rows: config.Rows, seed: int, what: str) -> RowSet:
    """The rows that meet every condition. `what` names the set in messages.

    Raises ConfigError for a class, id or subject that the shards do not have, and for an empty set.
    """
    wanted = None if rows.classes is None else {_label(manifest, c, f"data.{what}.classes") for c in rows.classes}
    unwanted = {_label(manifest, c, f"data.{what}.exclude_classes") for c in rows.exclude_classes or ()}
    columns = ["label"]
    for column, given in (("id", rows.ids), ("subject", rows.subjects)):
        if given is not None and (column in manifest.columns or column == "subject"):
            if column not in manifest.columns:
                raise ConfigError(f"data.{what}.{column}s: the shards at {manifest.uri} have no column `{column}`")
            columns.append(column)
    table = manifest.table(columns, _groups_with(manifest, wanted))
    table = table.append_column("key", pa.array(identity(manifest, table))) if rows.ids is not None else table
    table = _only(table, "label", wanted, None)
    if unwanted:
        table = table.filter(pc.invert(pc.is_in(table["label"], pa.array(sorted(unwanted)))))
    table = _only(table, "key", rows.ids, f"data.{what}.ids")
    table = _only(table, "subject", rows.subjects, f"data.{what}.subjects")
    chosen, labels = table["row"].to_numpy(), table["label"].to_numpy()
    if rows.per_class is not None:
        keep = [_draw(np.flatnonzero(labels == c), rows.per_class, seed, int(c)) for c in np.unique(labels)]
        kept = np.sort(np.concatenate(keep)) if keep else np.arange(0)
        chosen, labels = chosen[kept], labels[kept]
    if rows.limit is not None:
        kept = _draw(np.arange(len(chosen)), rows.limit, seed, -1)
        chosen, labels = chosen[kept], labels[kept]
    if not len(chosen):
        raise ConfigError(f"data.{what} selects no image of {manifest.uri}: the {what} set is empty; widen its conditions")
    return RowSet(manifest, chosen.astype(np.int64), labels.astype(np.int64))


def sets(data: config.Data, seed: int) -> dict[str, RowSet]:
    """{"retain": ..., "forget": ...} as training takes them; a proxy set stands in the retain role.

    A config without `retain` and `proxy` retains every row that is not forgotten. Raises ConfigError on an overlap.
    """
    manifest = shards.load(data.train)
    found: dict[str, RowSet] = {}
    if data.forget is not None:
        found["forget"] = select(manifest, data.forget, seed, "forget")
    if data.proxy is not None:
        other = shards.load(data.proxy_data) if data.proxy_data else manifest
        found["retain"] = select(other, data.proxy, seed, "proxy")
    elif data.retain is not None or data.forget is None:
        found["retain"] = select(manifest, data.retain or config.Rows(), seed, "retain")
    else:
        every = select(manifest, config.Rows(), seed, "retain")
        keep = ~np.isin(every.rows, found["forget"].rows)
        if not keep.any():
            raise ConfigError("data.forget selects every image: nothing is left to retain; give data.retain or data.proxy")
        found["retain"] = RowSet(manifest, every.rows[keep], every.labels[keep])
    _no_overlap(found)
    return found


def identity(manifest: shards.Manifest, table: pa.Table) -> list[str]:
    """The id of each row of a table that has `row`: its `id`, else `shard:row within the shard`."""
    if "id" in table.column_names:
        return table["id"].to_pylist()
    rows = table["row"].to_numpy()
    firsts = np.array([manifest.starts[i] for i, (_, g) in enumerate(manifest.groups) if g == 0])
    which = np.searchsorted(firsts, rows, side="right") - 1
    return [f"{manifest.shards[s].path}:{row - firsts[s]}" for s, row in zip(which, rows, strict=True)]


def name_row(manifest: shards.Manifest, row: int) -> str:
    """The id of one row, for messages."""
    group = int(manifest.group_of(np.array([row]))[0])
    columns = ["id"] if "id" in manifest.columns else ["label"]
    table = manifest.table(columns, [group])
    return identity(manifest, table)[row - int(manifest.starts[group])]


def _no_overlap(found: dict[str, RowSet]) -> None:
    if len(found) < 2 or found["forget"].manifest.hash != found["retain"].manifest.hash:
        return
    both = np.intersect1d(found["forget"].rows, found["retain"].rows)
    if len(both):
        manifest = found["forget"].manifest
        names = ", ".join(name_row(manifest, int(r)) for r in both[:3])
        raise ConfigError(
            f"data: forget and retain overlap in {len(both)} image(s), for example {names}; an image can only be in one of them"
        )


def _label(manifest: shards.Manifest, value: int | str, where: str) -> int:
    if isinstance(value, str):
        if value not in manifest.classes:
            raise ConfigError(f"{where}: no class {value!r} in {manifest.uri}; it has {_some(manifest.classes)}")
        return manifest.classes.index(value)
    low = min(g.labels[0] for s in manifest.shards for g in s.row_groups)
    high = max(g.labels[1] for s in manifest.shards for g in s.row_groups)
    if not low <= value <= high:
        raise ConfigError(f"{where}: no class {value} in {manifest.uri}; labels run from {low} to {high}")
    return value


def _some(names: list[str]) -> str:
    return ("labels without names: use numbers" if not names else ", ".join(names[:20])) + (", ..." if len(names) > 20 else "")


def _groups_with(manifest: shards.Manifest, labels: set[int] | None) -> list[int]:
    """Row groups whose label range can hold one of the labels."""
    spans = [manifest.shards[s].row_groups[g].labels for s, g in manifest.groups]
    return [i for i, (low, high) in enumerate(spans) if labels is None or any(low <= l <= high for l in labels)]


def _only(table: pa.Table, column: str, values, where: str | None) -> pa.Table:
    if values is None:
        return table
    kept = table.filter(pc.is_in(table[column], pa.array(sorted(values), table[column].type)))
    if where:
        missing = sorted(set(values) - set(kept[column].to_pylist()))
        if missing:
            raise ConfigError(f"{where}: {len(missing)} of {len(values)} not found, for example {missing[0]!r}")
    return kept


def _draw(index: np.ndarray, count: int, seed: int, name: int) -> np.ndarray:
    if len(index) <= count:
        return index
    return np.sort(order.generator(seed, 7, name & 0xFFFFFFFF).permutation(index)[:count])


def describe(found: dict[str, RowSet]) -> dict[str, dict]:
    """Counts by set, for logs and reports: no id and no image."""
    return {
        name: {"images": len(s), "classes": [int(c) for c in np.unique(s.labels)], "manifest": s.manifest.hash}
        for name, s in found.items()
    }
