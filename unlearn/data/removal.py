"""Shards without some of their rows: a new folder beside the old one, which is left as it is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.data import duplicates, journal, row_values, selection, shards
from unlearn.data.manifest import Manifest
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage, local_copy, told
from unlearn.errors import DataError


def with_duplicates(rows: RowSet) -> np.ndarray:
    """The rows of a set, and those that hold the same images under other numbers, by id or by their bytes;
    ascending."""
    manifest = rows.manifest
    every = np.arange(manifest.rows)
    same = duplicates.in_both((manifest, rows.rows), (manifest, every)) | np.isin(every, rows.rows)
    if "id" in manifest.columns:
        ids = np.array(selection.identity(manifest, manifest.table(["id"])), dtype=object)
        same |= np.isin(ids, ids[rows.rows])
    return every[same]


def touched(manifest: Manifest, gone: np.ndarray) -> list[str]:
    """The names of the files that hold something of these rows: their shards, and what lies beside the manifest of each
    row."""
    names = [manifest.shards[s].path for s in manifest.shards_of(manifest.group_of(gone))]
    beside = (
        (duplicates.file_name(manifest.split), manifest.images),
        (row_values.file_name(manifest.split), manifest.values),
    )
    left = Storage(manifest.uri).files(journal.FOLDER)  # of an index that was stopped
    return names + [name for name, there in beside if there] + left


def without(
    manifest: Manifest, gone: np.ndarray, dest: str, check: Callable[[], None] = lambda: None
) -> Manifest:  # fmt: skip
    """Write the shards without the rows `gone` to the folder `dest`, and their manifest last; it. What is there already
    is taken.

    A shard that loses nothing is copied as it is. check: asked before each shard; what it raises ends the writing.
    Raises DataError where nothing would be left, StorageError.
    """
    source, target = Storage(manifest.uri), Storage(dest)
    if shards.is_indexed(dest):
        return shards.load(dest)
    if len(np.unique(gone)) >= manifest.rows:
        raise DataError(
            f"{manifest.uri}: no row is left without those that are served: the shards are not written anew"
        )
    target.delete("")
    keep, described, first = np.ones(manifest.rows, bool), [], 0
    keep[gone] = False
    for shard in manifest.shards:
        check()
        wanted, first = keep[first : first + shard.rows], first + shard.rows
        if not wanted.any():
            continue
        with local_copy(source.where(shard.path)) as old, target.writing(shard.path) as new:
            if wanted.all():
                shutil.copyfile(old, new)
            else:
                _filter(old, new, wanted, source.where(shard.path))
            described.append(shards.describe(new, shard.path, target.where(shard.path), manifest.names))
    classes = None if any(one.classes for one in described) else manifest.classes
    return shards.save(*shards.collect(target.uri, described, classes))


def _filter(old: Path, new: Path, wanted: np.ndarray, where: str) -> None:
    """Write the wanted rows of a Parquet file, every column as it is, row group by row group."""
    with told(where), pq.ParquetFile(old) as file:
        codec = file.metadata.row_group(0).column(0).compression.lower()
        compression = "none" if codec == "uncompressed" else codec
        with pq.ParquetWriter(new, file.schema_arrow, compression=compression, write_page_index=True) as writer:
            first = 0
            for g in range(file.num_row_groups):
                table = file.read_row_group(g)
                mask, first = wanted[first : first + len(table)], first + len(table)
                if mask.any():
                    writer.write_table(table.filter(pa.array(mask)), row_group_size=int(mask.sum()))
