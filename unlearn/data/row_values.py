"""What the shards say of each row but its image: labels, ids and subjects of all rows in one Parquet file beside the
manifest.

Rows are chosen by it, so that a class or a thousand ids are found among millions of rows by a few requests, and no
shard is opened. The labels are those of the folder.
"""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.data.parquet_file import short
from unlearn.data.storage import Storage
from unlearn.errors import DataError, StorageError

GROUP = 1 << 17  # rows
_CHUNK = 1 << 20  # bytes that are compared at a time


def write(storage: Storage, split: str | None, table: pa.Table) -> str:
    """Store the values of all rows in their order; the sha256 of what is stored."""
    sink = pa.BufferOutputStream()
    repeated = [name for name in table.column_names if name != "id"]
    delta = {"id": "DELTA_BYTE_ARRAY"} if "id" in table.column_names else None  # ids share their beginnings
    pq.write_table(
        table, sink, row_group_size=GROUP, compression="zstd", column_encoding=delta,
        use_dictionary=repeated,  # pyright: ignore[reportArgumentType]  pyarrow declares a bool alone, and takes names
    )  # fmt: skip
    data = sink.getvalue().to_pybytes()
    storage.write(file_name(split), data)
    return hashlib.sha256(data).hexdigest()


def opened(uri: str, split: str | None, sha256: str) -> pq.ParquetFile:
    """The file, which is that of the manifest: on a disk it is compared piece by piece and stays there, on S3 it is
    fetched at once. Raises DataError where it is missing or damaged, StorageError."""
    storage, name = Storage(uri), file_name(split)
    digest = hashlib.sha256()
    try:
        if storage.is_local():
            file = storage.open(name)  # what is read of it later is of this file, also where another takes its name
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                digest.update(chunk)
        else:
            data = storage.read(name)
            digest.update(data)
            file = pa.BufferReader(data)
        if digest.hexdigest() == sha256:
            return pq.ParquetFile(file)
    except StorageError:
        if storage.is_file(name):
            raise
    given = f"{uri} --split {split}" if split else uri
    raise DataError(f"{storage.where(name)}: missing or damaged; make it anew with `unlearn shards index {given}`")


def read(uri: str, split: str | None, sha256: str, columns: list[str]) -> pa.Table:
    """Some columns of all rows. Raises DataError and StorageError."""
    file = opened(uri, split, sha256)
    parts = [piece(file, group, columns, uri) for group in range(file.num_row_groups)]
    return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table().select(columns)


def piece(file: pq.ParquetFile, group: int, columns: list[str], uri: str) -> pa.Table:
    """Some columns of GROUP rows, or of the last rows. Raises DataError, which names `uri`, where they cannot be
    read."""
    try:
        return file.read_row_group(group, columns=columns, use_threads=False).select(columns)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{uri}: its file of values cannot be read ({short(e)}); try again") from None


def file_name(split: str | None) -> str:
    return f"manifest-{split}.rows" if split else "manifest.rows"
