"""Which rows are the forget, the retain and the proxy set."""

# pyarrow makes the functions of pyarrow.compute at import, so pyright knows none of them.
# pyright: reportAttributeAccessIssue=false

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn import config
from unlearn.data import classes, duplicates, id_file, shards
from unlearn.data.conditions import Choosing, Labels, Wanted, identity
from unlearn.data.row_batches import RowBatches
from unlearn.data.row_set import RowSet
from unlearn.errors import ConfigError

log = logging.getLogger(__name__)


def select(manifest: shards.Manifest, rows: config.Rows, seed: int, what: str) -> RowSet:
    """The rows that meet every condition. `what` names the set in messages.

    Raises ConfigError for a class, id or subject that the shards do not have, and for an empty set.
    """
    return _select({what: _wanted(manifest, rows, what)}, _batches([manifest]), seed)[what]


def sets(data: config.Data, seed: int) -> dict[str, RowSet]:
    """{"retain": ..., "forget": ...} as training takes them; a proxy set takes the retain role.

    A config without `retain` and `proxy` retains every row that is not forgotten. No shard is opened where the manifest
    has a file of all values.
    Raises ConfigError on an overlap.
    """
    manifest = shards.load(data.train, data.split)
    wanted: dict[str, Wanted] = {}
    if data.forget is not None:
        wanted["forget"] = _wanted(manifest, data.forget, "forget")
    if data.proxy is not None:
        same = (data.proxy_data or data.train, data.proxy_split or data.split) == (data.train, data.split)
        other = manifest if same else shards.load(data.proxy_data or data.train, data.proxy_split)
        _no_foreign_number(data.proxy, other, manifest)
        wanted["retain"] = _wanted(other, data.proxy, "proxy")
    else:
        wanted["retain"] = _wanted(manifest, data.retain or config.Rows(), "retain")
    batches = _batches(one.manifest for one in wanted.values())
    rest = data.forget is not None and data.proxy is None and data.retain is None
    row_sets = _select(wanted, batches, seed, rest)
    if not rest:
        _no_overlap(row_sets)
    if "forget" in row_sets:
        row_sets["retain"] = _without_forgotten(row_sets["forget"], row_sets["retain"], batches)
    return row_sets


def _without_forgotten(forget: RowSet, retain: RowSet, batches: dict[int, RowBatches]) -> RowSet:
    """The retain set without images that are also in the forget set under another row number, compared by id and by
    bytes."""
    twice = np.zeros(len(retain), bool)
    if "id" in forget.manifest.columns and "id" in retain.manifest.columns:
        ids = pa.chunked_array((own for _, own in _ids(forget, batches)), pa.string()).combine_chunks()
        for place, own in _ids(retain, batches, len(ids)):
            twice[place] = pc.is_in(own, ids).to_numpy(zero_copy_only=False)
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


def _ids(rows: RowSet, batches: dict[int, RowBatches], listed: int = 0) -> Iterator[tuple[slice, pa.Array]]:
    """(places in the set, their ids) piece by piece; listed: as in RowBatches.read."""
    start = 0
    for table in batches[id(rows.manifest)].read(["id"], rows.touched, listed):
        numbers = table["row"].to_numpy()
        stop = int(np.searchsorted(rows.rows, rows.rows.dtype.type(numbers[-1]), side="right"))
        mine = np.isin(numbers, rows.rows[start:stop], assume_unique=True)
        yield slice(start, stop), table["id"].filter(pa.array(mine)).combine_chunks()
        start = stop


def _no_foreign_number(rows: config.Rows, other: shards.Manifest, train: shards.Manifest) -> None:
    """Raises ConfigError where a proxy class is given by a number that means another class in `train`."""
    for number in (c for c in (*(rows.classes or ()), *(rows.exclude_classes or ())) if not isinstance(c, str)):
        if other.classes and train.classes and other.class_name(number) != train.class_name(number):
            raise ConfigError(
                f"data.proxy: label {number} is {other.class_name(number)!r} in {other.uri} and "
                f"{train.class_name(number)!r} in {train.uri}; give the class by its name"
            )


def _wanted(manifest: shards.Manifest, rows: config.Rows, what: str) -> Wanted:
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
    return Wanted(manifest, rows, what, labels, unwanted, columns, set(groups.tolist()), listed)


def label(manifest: shards.Manifest, value: int | str, where: str) -> int:
    """The label of a class by its name or label. Raises ConfigError where there is no such class, or several."""
    return classes.label(manifest, _span(_spans(manifest)), value, where)


def _spans(manifest: shards.Manifest) -> np.ndarray:
    """(n, 2): the smallest and the largest label of each row group that has rows."""
    facts = manifest.facts
    return np.stack([facts["min_label"], facts["max_label"]], axis=1)[facts["rows"] > 0]


def _span(spans: np.ndarray) -> tuple[int, int]:
    return (int(spans[:, 0].min()), int(spans[:, 1].max())) if len(spans) else (0, -1)


def _batches(manifests: Iterable[shards.Manifest]) -> dict[int, RowBatches]:
    """By the identity of each manifest."""
    return {id(manifest): RowBatches(manifest) for manifest in manifests}


def _select(
    wanted: dict[str, Wanted], batches: dict[int, RowBatches], seed: int, rest: bool = False
) -> dict[str, RowSet]:
    """The rows of each set; sets of the same manifest are chosen in one reading.

    rest: the retain set, of the same manifest, is without the forget set. Raises ConfigError where nothing is left.
    """
    choosing = {name: Choosing(one) for name, one in wanted.items()}
    labels = {key: Labels(source.manifest) for key, source in batches.items()}
    for key, source in batches.items():
        mine = [name for name, one in wanted.items() if id(one.manifest) == key]
        columns = sorted(set().union(*(wanted[name].columns for name in mine)))
        groups = sorted(set().union(*(wanted[name].groups for name in mine)))
        for table in source.read(columns, groups, max(wanted[name].listed_ids for name in mine)):
            labels[key].take(table)
            for name in mine:
                choosing[name].take(table)
    row_sets: dict[str, RowSet] = {}
    for name in wanted:
        chosen = choosing.pop(name)  # let go of as soon as its set is made
        if rest and name == "retain" and not chosen.leave_out(row_sets["forget"]):
            raise ConfigError(
                "data.forget selects every image: nothing is left to retain; give data.retain or data.proxy"
            )
        row_sets[name] = chosen.chosen(labels[id(wanted[name].manifest)], seed)
    return row_sets


def name_row(manifest: shards.Manifest, row: int) -> str:
    """The id of one row, for messages."""
    group = int(manifest.group_of(np.array([row]))[0])
    table = manifest.table(["id"] if "id" in manifest.columns else [], [group])
    return identity(manifest, table)[row - int(manifest.starts[group])]


def _place(manifest: shards.Manifest, row: int) -> str:
    """Where a row lies, for messages that may be logged: unlike its id it tells nothing of a person."""
    group = int(manifest.group_of(np.array([row]))[0])
    s, g = manifest.groups[group].tolist()
    return f"row {row - int(manifest.starts[group])} of row group {g} of {manifest.shards[s].path}"


def _no_overlap(row_sets: dict[str, RowSet]) -> None:
    if len(row_sets) < 2 or row_sets["forget"].manifest.hash != row_sets["retain"].manifest.hash:
        return
    forget = row_sets["forget"].rows
    both = forget[np.isin(forget, row_sets["retain"].rows)]
    if len(both):
        manifest = row_sets["forget"].manifest
        raise ConfigError(
            f"data: forget and retain overlap in {len(both)} image(s), for example {_place(manifest, int(both[0]))}; "
            "an image can only be in one of them. Leave what is forgotten out of data.retain (exclude_classes); "
            "without data.retain, all the rest is retained"
        )


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
