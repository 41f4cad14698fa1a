"""What one shard says of itself, without the other shards of its folder."""

# pyarrow makes the functions of pyarrow.compute at import, so pyright knows none of them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unlearn.data import classes as class_lists
from unlearn.data import columns as roles
from unlearn.data import duplicates
from unlearn.data.manifest import Shard
from unlearn.data.parquet_file import extent, opened, short
from unlearn.data.row_groups import RowGroup, RowGroups
from unlearn.data.storage import told
from unlearn.errors import DataError

# Row groups of a file that one thread reads in turn: at least so many, and more where they are small.
TOGETHER, PART = 16, 64 << 20
# Row group with labels still unknown, its distinct labels, checksum of each image, the other values.
Found = tuple[RowGroup, np.ndarray, np.ndarray, pa.Table]


@dataclass(frozen=True)
class Described:
    """What can be read from one shard alone, without the other shards of the folder.

    columns: {role: column}. classes: names of its labels, or [] where they are numbers without names. text: whether its
    labels are stored as those names. labels: the distinct labels of each row group. images: checksum of each image.
    values: every column but the image, as it is stored.
    """

    shard: Shard
    columns: dict[str, str]
    classes: list[str]
    text: bool
    labels: list[np.ndarray]
    images: np.ndarray
    values: pa.Table


def images(table: pa.Table) -> Iterator[memoryview]:
    """The encoded images of a table read with column `image`, views of its memory; an empty one where the image is
    null."""
    for chunk in table.column("image").chunks:
        chunk = roles.encoded(chunk)
        # Arrow's own scalars would hold copies.
        _, _, data = chunk.buffers()
        whole, ends = memoryview(data or b"").cast("B"), roles.places(chunk).tolist()
        valid = chunk.is_valid().to_pylist() if chunk.null_count else itertools.repeat(True)
        yield from (whole[a:b] if there else whole[:0] for a, b, there in zip(ends, ends[1:], valid, strict=False))


def describe(
    path: Path, name: str, where: str, given: dict[str, str] | None = None, before: dict[str, str] | None = None,
    threads: int = 1,
    read: Callable[[int], object] = lambda size: None,
    kept: Callable[[range], list[Found] | None] = lambda groups: None,
    keep: Callable[[range, list[Found]], object] = lambda groups, found: None,
) -> Described:  # fmt: skip
    """The description of the local Parquet file `path`; `where` names it in messages. Raises DataError.

    given: {role: column} that the user names; before: those of an earlier manifest, used where the file has such
    columns. threads: row groups that are in memory at the same time; read: told the bytes of each that is done.
    kept, keep: gives what a reading that was stopped has found in some row groups, and is told what this one has found,
    where the file is read in several parts.
    """

    def part(groups: range) -> list[Found]:
        if (found := kept(groups)) is not None:
            read(sum(group.bytes for group, *_ in found))
            return found
        with pa.OSFile(str(path), "rb") as file, opened(file, where, footer) as parquet:
            found = []
            for g in groups:
                found.append(_describe_group(parquet, file, g, columns, name, where))
                read(found[-1][0].bytes)
        if len(groups) < count:
            keep(groups, found)
        return found

    def digest() -> str:
        with open(path, "rb") as whole:
            return hashlib.file_digest(whole, "sha256").hexdigest()

    with told(where), pa.OSFile(str(path), "rb") as file:
        with opened(file, where) as parquet:
            schema, footer, count = parquet.schema_arrow, parquet.metadata, parquet.num_row_groups
            try:
                known = {role: column for role, column in (before or {}).items() if column in schema.names}
                columns = roles.find(parquet, name, known | (given or {}), where)
            except (pa.ArrowException, OSError) as e:
                raise DataError(f"{where}: unreadable ({short(e)}); restore the shard") from None
        with ThreadPoolExecutor(threads) as pool:
            sha256 = pool.submit(digest)
            step = max(TOGETHER, PART * count // max(1, path.stat().st_size))
            parts = pool.map(part, [range(g, min(g + step, count)) for g in range(0, count, step)])
            row_groups = [one for found in parts for one in found]
            known = RowGroups.of(group for group, *_ in row_groups)
            shard = Shard(name, path.stat().st_size, sha256.result(), known)
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
) -> Found:
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
                f"{at}: label {labels.min()}, and labels are 0 or more. Rows of a test split without labels are often "
                "marked so: leave that file out, choose a split with --split, or go without labels (--label-column "
                f"{roles.NONE})"
            )
    if values.get("id") is not None and values["id"].null_count:
        raise DataError(
            f"{at}: {values['id'].null_count} row(s) have no {columns['id']}; give every row one, or say --id-column "
            f"{roles.NONE}"
        )
    file.seek(offset)
    digest = hashlib.sha256(file.read_buffer(size)).hexdigest()
    checks = {role: roles.checksum(column.chunks) for role, column in values.items()}
    sums = np.array([duplicates.checksum(image) for image in images(pa.table({"image": values["image"]}))], np.uint64)
    others = pa.table({role: column for role, column in values.items() if role != "image"})
    return RowGroup(rows, offset, size, (0, -1), digest, checks), labels, sums, others
