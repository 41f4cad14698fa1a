"""Parquet shards and their manifest.

A shard is a Parquet file in the usual form of published image data sets: `image` (struct<bytes, path> or binary),
`label` (whole numbers or text), and optionally `id` and `subject`; `columns.py` lists what else is accepted.
`manifest.json` beside the shards lists every row group with its rows, bytes, label range and checksums. A folder with
several splits has a manifest for each.
"""

# pyarrow makes the functions of pyarrow.compute at import, so pyright knows none of them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unlearn.data import classes as class_lists
from unlearn.data import columns as roles
from unlearn.data import duplicates
from unlearn.data.manifest import SCHEMA, Manifest, RowGroup, Shard
from unlearn.data.manifest_file import MANIFEST, RowFacts, is_indexed, is_ours, load, manifest_name, save
from unlearn.data.parquet_file import extent, opened, parquet, short
from unlearn.data.storage import Storage, local_copy, told
from unlearn.errors import DataError

__all__ = ["MANIFEST", "SCHEMA", "Described", "Manifest", "RowGroup", "Shard", "collect", "describe", "find", "images", "index", "is_indexed",
           "load", "look", "parquet", "save", "split_of"]  # fmt: skip

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}


@dataclass(frozen=True)
class Described:
    """What can be read from one shard alone, without the other shards of the folder.

    columns: {role: column}. classes: names of its labels, or [] where they are numbers without names. text: whether its labels
    are stored as those names. labels: the distinct labels of each row group. images: checksum of each image. values: every column
    but the image, as it is stored.
    """

    shard: Shard
    columns: dict[str, str]
    classes: list[str]
    text: bool
    labels: list[np.ndarray]
    images: np.ndarray
    values: pa.Table


def images(table: pa.Table) -> Iterator[memoryview]:
    """The encoded images of a table read with column `image`; an empty view where the image is null."""
    for chunk in table.column("image").chunks:
        for value in roles.encoded(chunk):
            buffer = value.as_buffer() if value.is_valid else None
            yield memoryview(buffer).cast("B") if buffer is not None else memoryview(b"")


def index(
    uri: str, split: str | None = None, columns: dict[str, str] | None = None, classes: list[str] | None = None
) -> Manifest:  # fmt: skip
    """Make and write the manifest of existing shards. Nothing is converted; every page is read once.

    split: take only the files of that split. columns: {role: column} where a column is not named as its role. classes:
    names of the labels 0, 1, ...; by default those in the shards' metadata, or those of the previous manifest.
    Raises DataError for shards that cannot be used, and where manifest.json was written by another program.
    """
    storage = Storage(uri)
    name = manifest_name(split)
    if storage.is_file(name) and not is_ours(storage.read(name)):
        raise DataError(
            f"{uri}/{name} is not of this program and is kept: rename it, or move the shards to a folder of their own"
        )
    return save(*look(uri, split, columns, classes))


def find(uri: str, split: str | None = None) -> Manifest:
    """The manifest of a folder, or, where it has none, one made from its shards; nothing is written."""
    return load(uri, split) if is_indexed(uri, split) else look(uri, split)[0]


def look(
    uri: str, split: str | None = None, columns: dict[str, str] | None = None, classes: list[str] | None = None
) -> tuple[Manifest, RowFacts]:  # fmt: skip
    """(manifest of the existing shards, what is told of each row); arguments and errors are those of `index`."""
    storage = Storage(uri)
    names = _of_split(storage, split)
    try:
        before = load(uri, split)
    except DataError:
        before = None
    described = []
    for name in names:
        with local_copy(storage.where(name)) as path:
            described.append(describe(path, name, storage.where(name), columns, before.names if before else None))
    if classes is None and before and {s.sha256 for s in before.shards} & {d.shard.sha256 for d in described}:
        if not any(d.classes for d in described):
            classes = before.classes  # earlier versions wrote the names in the manifest alone
    manifest, rows = collect(storage.uri, described, classes)
    return replace(manifest, split=split), rows


def collect(uri: str, described: list[Described], classes: list[str] | None = None) -> tuple[Manifest, RowFacts]:
    """(manifest of shards from the results of `describe`, what is told of each row). classes: instead of the shards' own
    names.

    Raises DataError where files of one folder contradict each other.
    """
    for role in roles.ROLES:
        called = {d.columns[role]: d.shard.path for d in described if role in d.columns}
        if len(called) > 1:
            (one, first), (other, second) = list(called.items())[:2]
            raise DataError(
                f"{uri}: the {role} is column `{one}` of {first} and `{other}` of {second}: write them alike, or index them apart"
            )
    columns = [role for role in roles.ROLES if all(role in d.columns for d in described)]
    filled = [d for d in described if len(d.images)]
    if "label" not in columns and any("label" in d.columns for d in filled):
        lacking = next(d for d in filled if "label" not in d.columns)
        raise DataError(
            f"{uri}/{lacking.shard.path}: has no label, and files beside it have: write them alike, or index them apart"
        )
    names = {role: d.columns[role] for d in described for role in columns if d.columns[role] != role}
    classes = classes or None
    lists = {f"{uri}/{d.shard.path}": d.classes if classes is None or d.text else classes for d in filled}
    common = class_lists.common(lists, any(d.text for d in filled), classes)
    shards = []
    for d in described:
        own = class_lists.mapping(lists.get(f"{uri}/{d.shard.path}", []), common)
        spans = [_span(labels, own) for labels in d.labels]
        groups = [replace(group, labels=span) for group, span in zip(d.shard.row_groups, spans, strict=True)]
        same = d.text or own == list(range(len(own)))
        shards.append(replace(d.shard, row_groups=groups, labels=[] if same else own))
    manifest = Manifest(uri, columns, common, shards, names)
    checksums = np.concatenate([d.images for d in described]) if described else np.empty(0, np.uint64)
    return manifest, RowFacts(checksums, manifest.values_of([d.values for d in described]))


def describe(
    path: Path, name: str, where: str, given: dict[str, str] | None = None, before: dict[str, str] | None = None
) -> Described:  # fmt: skip
    """The description of the local Parquet file `path`; `where` names it in messages. Raises DataError.

    given: {role: column} that the user names; before: those of an earlier manifest, used where the file has such
    columns.
    """
    with told(where), pa.OSFile(str(path), "rb") as file, opened(file, where) as parquet, open(path, "rb") as whole:
        schema = parquet.schema_arrow
        try:
            known = {role: column for role, column in (before or {}).items() if column in schema.names}
            columns = roles.find(parquet, name, known | (given or {}), where)
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{where}: unreadable ({short(e)}); restore the shard") from None
        row_groups = [_describe_group(parquet, file, g, columns, name, where) for g in range(parquet.num_row_groups)]
        shard = Shard(
            name, file.size(), hashlib.file_digest(whole, "sha256").hexdigest(), [group for group, *_ in row_groups]
        )
    labels = [distinct for _, distinct, _, _ in row_groups]
    text = any(values.dtype.kind == "O" for values in labels)
    if text:
        classes = class_lists.ordered({str(value) for values in labels for value in values})
        place = {value: i for i, value in enumerate(classes)}
        labels = [np.array([place[value] for value in values], np.int64) for values in labels]
    else:
        classes = roles.class_names(schema, columns["label"]) if columns.get("label") in schema.names else []
    return Described(
        shard,
        columns,
        classes,
        text,
        labels,
        np.concatenate([np.empty(0, np.uint64), *(sums for _, _, sums, _ in row_groups)]),
        pa.concat_tables([values for *_, values in row_groups]) if row_groups else pa.table({}),
    )


def _describe_group(
    parquet: pq.ParquetFile, file: pa.NativeFile, g: int, columns: dict[str, str], name: str, where: str
) -> tuple[RowGroup, np.ndarray, np.ndarray, pa.Table]:  # fmt: skip
    """(row group with labels still unknown, its distinct labels, checksum of each image, the other values)."""
    rows, offset, size = extent(parquet, g)
    at = f"{where}, row group {g}"
    inside = [column for column in columns.values() if column in parquet.schema_arrow.names]
    try:
        table = parquet.read_row_group(g, columns=inside)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{at}: unreadable ({short(e)}); restore the shard") from None
    values = {
        role: roles.values(
            table[column] if column in inside else roles.of_path(name, column, role, rows, where), role, at
        )
        for role, column in columns.items()
    }
    labels = np.empty(0, np.int64)
    if "label" in values:
        labels = pc.unique(values["label"]).to_numpy(zero_copy_only=False)
        if labels.dtype != object and len(labels) and labels.min() < 0:
            raise DataError(
                f"{at}: label {labels.min()}, and labels are 0 or more. Rows of a test split without labels are often marked so: "
                f"leave that file out, choose a split with --split, or go without labels (--label-column {roles.NONE})"
            )
    if values.get("id") is not None and values["id"].null_count:
        raise DataError(
            f"{at}: {values['id'].null_count} row(s) have no {columns['id']}; give every row one, or say --id-column {roles.NONE}"
        )
    file.seek(offset)
    digest = hashlib.sha256(file.read_buffer(size)).hexdigest()
    checks = {role: roles.checksum(column.chunks) for role, column in values.items()}
    sums = np.array([duplicates.checksum(image) for image in images(pa.table({"image": values["image"]}))], np.uint64)
    others = pa.table({role: column for role, column in values.items() if role != "image"})
    return RowGroup(rows, offset, size, (0, -1), digest, checks), labels, sums, others


def _span(labels: np.ndarray, own: list[int]) -> tuple[int, int]:
    """The smallest and the largest label of a row group, in the folder's numbering."""
    mapped = [own[label] if label < len(own) else int(label) for label in labels.tolist()]
    return (min(mapped), max(mapped)) if mapped else (0, -1)


def split_of(name: str) -> str | None:
    """The split that a file belongs to by its name (`train-00000-of-00002.parquet`) or its folder (`train/`, `split=train/`)."""
    *folders, file = name.split("/")
    if hub := re.match(r"(.+)-\d{5,}-of-\d{5,}", file):
        return hub[1]
    first = re.split(r"[-_.]", file)[0].lower()
    inner = next(
        (f.removeprefix("split=") for f in reversed(folders) if f.lower().removeprefix("split=") in SPLITS), None
    )
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
        return [n for n in names if split_of(n) == split]
    if len(there) > 1:
        raise DataError(
            f"{storage.uri}: holds several splits: {', '.join(there)}; choose one with --split, or index a folder of one split"
        )
    return names
