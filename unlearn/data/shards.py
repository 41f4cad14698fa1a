"""Parquet shards and their manifest.

A shard is a Parquet file in the usual form of published image data sets: `image` (struct<bytes, path> or binary),
`label` (whole numbers or text), and optionally `id` and `subject`; `columns.py` lists what else is accepted.
The manifest beside the shards lists every row group with its rows, bytes, label range and checksums (see
manifest_file.py). A folder with several splits has a manifest for each.
"""

import functools
import logging
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa

from unlearn.data import classes as class_lists
from unlearn.data import columns as roles
from unlearn.data.described import Described, describe, images
from unlearn.data.journal import Journal
from unlearn.data.manifest import SCHEMA, Manifest, Shard
from unlearn.data.manifest_file import MANIFEST, RowFacts, is_indexed, is_manifest, load, save
from unlearn.data.parquet_file import parquet
from unlearn.data.row_groups import RowGroups
from unlearn.data.storage import Storage, local_copy
from unlearn.errors import DataError

__all__ = ["MANIFEST", "SCHEMA", "Described", "Manifest", "Shard", "collect", "describe", "find", "images",
    "index", "is_indexed",
           "is_manifest", "load", "look", "parquet", "save", "split_of"]  # fmt: skip

log = logging.getLogger(__name__)

COUNTED = 1 << 16  # classes whose rows a manifest counts
_HUB = re.compile(r"(.+)-\d{5,}-of-\d{5,}")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}


Progress = Callable[[int, int], object]


def index(
    uri: str, split: str | None = None, columns: dict[str, str] | None = None, classes: list[str] | None = None,
    progress: Progress = lambda done, total: None, threads: int | None = None,
) -> Manifest:  # fmt: skip
    """Make and write the manifest of existing shards. Nothing is converted; every page is read once, also where an
    index was stopped before: what it has found in each file is kept until the manifest is written.

    split: take only the files of that split. columns: {role: column} where a column is not named as its role. classes:
    names of the labels 0, 1, ...; by default those in the shards' metadata, or those of the previous manifest.
    progress: called with (bytes that are done, bytes in all), from any thread; threads: row groups that are in memory
    at the same time, by default as many as the machine has cores, 16 at most. Raises DataError for shards that cannot
    be used.
    """
    made = save(*look(uri, split, columns, classes, progress, threads, keep=True))
    Journal(Storage(uri), {}).clear()
    return made


def find(uri: str, split: str | None = None) -> Manifest:
    """The manifest of a folder, or, where it has none, one made from its shards; nothing is written."""
    try:
        return load(uri, split)
    except DataError:
        if is_indexed(uri, split):
            raise
    return look(uri, split)[0]


def look(
    uri: str, split: str | None = None, columns: dict[str, str] | None = None, classes: list[str] | None = None,
    progress: Progress = lambda done, total: None, threads: int | None = None, keep: bool = False,
) -> tuple[Manifest, RowFacts]:  # fmt: skip
    """(manifest of the existing shards, what is told of each row); arguments and errors are those of `index`.

    keep: write beside the shards what is found in each, and take what stands there.
    """
    storage, given = Storage(uri), classes
    names = _of_split(storage, split)
    try:
        before = load(uri, split)
    except DataError:
        before = None
    described = _described(storage, names, columns, before.names if before else None, progress, threads, keep)
    if classes is None and before and {s.sha256 for s in before.shards} & {d.shard.sha256 for d in described}:
        if not any(d.classes for d in described):
            classes = before.classes  # earlier versions wrote the names in the manifest alone
    numbers = [int(labels.max()) for d in described if not d.text for labels in d.labels if len(labels)]
    if given and max(numbers, default=0) >= len(given):
        raise DataError(f"{storage.uri}: label {max(numbers)}, and {len(given)} class names are given: name them all")
    if not any(len(d.images) for d in described):
        raise DataError(f"{storage.uri}: its Parquet files hold no row")
    manifest, rows = collect(storage.uri, described, classes)
    return replace(manifest, split=split), rows


def _described(
    storage: Storage, names: list[str], columns: dict[str, str] | None, before: dict[str, str] | None,
    progress: Progress,
    threads: int | None, keep: bool,
) -> list[Described]:  # fmt: skip
    """The descriptions of these shards, several of which are read at the same time."""
    threads = threads or min(16, os.cpu_count() or 1)
    files = min(threads, len(names))
    facts = {name: storage.facts(name) for name in names} if storage.is_local() else storage.objects()
    journal = Journal(storage, {"columns": columns, "before": before}) if keep else None
    total, done, lock = sum(facts[name].size for name in names), 0, threading.Lock()

    def read(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(min(done, total - 1), total)

    def one(name: str) -> Described:
        if journal and (known := journal.get(name, facts[name])):
            read(facts[name].size)
            return known
        with local_copy(storage.where(name)) as path:
            parts = {}
            if journal:
                parts["kept"] = functools.partial(journal.part, name, facts[name])
                parts["keep"] = functools.partial(journal.put_part, name, facts[name])
            found = describe(path, name, storage.where(name), columns, before, threads // files, read, **parts)
        if journal:
            journal.put(found, facts[name])
        return found

    with ThreadPoolExecutor(files) as pool:
        described = list(pool.map(one, names))
    progress(total, total)
    return described


def collect(uri: str, described: list[Described], classes: list[str] | None = None) -> tuple[Manifest, RowFacts]:
    """(manifest of shards from the results of `describe`, what is told of each row). classes: instead of the shards'
    own names.

    Raises DataError where files of one folder contradict each other.
    """
    for role in roles.ROLES:
        called = {d.columns[role]: d.shard.path for d in described if role in d.columns}
        if len(called) > 1:
            (one, first), (other, second) = list(called.items())[:2]
            raise DataError(
                f"{uri}: the {role} is column `{one}` of {first} and `{other}` of {second}: write them alike, or "
                "index them apart"
            )
    filled = [d for d in described if len(d.images)]
    columns = [role for role in roles.ROLES if all(role in d.columns for d in described)]
    for role in ("label", "id", "subject"):
        lacking = next((d for d in filled if role not in d.columns), None)
        if role in columns or lacking is None or not any(role in d.columns for d in filled):
            continue
        what = f"{uri}/{lacking.shard.path}: has no {role}, and files beside it have"
        if role == "label":
            raise DataError(f"{what}: write them alike, or index them apart")
        log.warning("%s: no row of the folder will be found by it; write them alike, or index them apart", what)
    names = {role: d.columns[role] for d in described for role in columns if d.columns[role] != role}
    classes = classes or None
    lists = {f"{uri}/{d.shard.path}": d.classes if classes is None or d.text else classes for d in filled}
    common = class_lists.common(lists, any(d.text for d in filled), classes)
    shards = []
    for d in described:
        own = class_lists.mapping(lists.get(f"{uri}/{d.shard.path}", []), common)
        spans = [_span(labels, own) for labels in d.labels]
        known = zip(d.shard.row_groups, spans, strict=True)
        groups = RowGroups.of(replace(group, labels=span) for group, span in known)
        same = d.text or own == list(range(len(own)))
        shards.append(replace(d.shard, row_groups=groups, labels=[] if same else own))
    manifest = Manifest(uri, columns, common, shards, names)
    checksums = np.concatenate([d.images for d in described]) if described else np.empty(0, np.uint64)
    values = manifest.values_of([d.values for d in described])
    return replace(manifest, counts=_counts(values)), RowFacts(checksums, values)


def _counts(values: pa.Table) -> dict[int, int]:
    """{label: rows} of all rows; empty where there are none, or too many labels for a manifest."""
    if "label" not in values.column_names:
        return {}
    labels, counts = np.unique(values["label"].to_numpy(), return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True)) if len(labels) <= COUNTED else {}


def _span(labels: np.ndarray, own: list[int]) -> tuple[int, int]:
    """The smallest and the largest label of a row group, in the folder's numbering."""
    mapped = [own[label] if label < len(own) else int(label) for label in labels.tolist()]
    return (min(mapped), max(mapped)) if mapped else (0, -1)


def split_of(name: str) -> str | None:
    """The split that a file belongs to by its name (`train-00000-of-00002.parquet`) or its folder (`train/`,
    `split=train/`)."""
    *folders, file = name.split("/")
    if hub := _HUB.match(file):
        return hub[1]
    first = re.split(r"[-_.]", file)[0].lower()
    below = [
        re.sub(r"^(split=|partial-)", "", f, flags=re.I) for f in folders
    ]  # partial-: where the hub converts a part
    inner = next((f for f in reversed(below) if f.lower() in SPLITS), None)
    return inner or (first if first in SPLITS else None)


def is_shard(name: str) -> bool:
    """Whether a file is data: it has a Parquet suffix, and no part of its path is hidden or temporary (`.` or `_`
    first)."""
    parts = name.split("/")
    return parts[-1].lower().endswith((".parquet", ".pq")) and not any(part.startswith((".", "_")) for part in parts)


def _of_split(storage: Storage, split: str | None) -> list[str]:
    names = [n for n in storage.files() if is_shard(n)]
    if not names:
        raise DataError(f"{storage.uri}: no .parquet file there")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{storage.uri}: the name of a file is not UTF-8: {name.encode(errors='replace').decode()}; rename it"
            ) from None
    there = sorted({split_of(n) or "(none)" for n in names})
    if split is not None:
        if split not in there:
            raise DataError(f"{storage.uri}: no files of a split {split}; there are {', '.join(there)}")
        names = [n for n in names if split_of(n) == split]
    elif len(there) > 1:
        raise DataError(
            f"{storage.uri}: holds several splits: {', '.join(there)}; choose one with --split, or index a folder of "
            "one split"
        )
    _tell_configs(storage.uri, names)
    return names


def _tell_configs(uri: str, names: list[str]) -> None:
    """Warn where the same numbered file stands in several folders: a hub keeps versions of one data set so."""
    folders: dict[str, list[str]] = {}
    for folder, _, file in (name.rpartition("/") for name in names if not roles.partitions(name)):
        if _HUB.match(file):
            folders.setdefault(file, []).append(folder or ".")
    if several := next((found for found in folders.values() if len(found) > 1), None):
        log.warning(
            "%s: %s hold files of the same names, and are taken as one set: where they are versions of one set, index "
            "one folder of them",
            uri, ", ".join(several[:4]),
        )  # fmt: skip
