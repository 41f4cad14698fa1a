"""What the shards say of each row but its image: labels, ids and subjects of all rows in one Parquet file beside the
manifest.

Rows are chosen by it, so that a class or a thousand ids are found among millions of rows by a few requests, and no
shard is opened. The labels are those of the folder.
"""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.data.storage import Storage
from unlearn.errors import DataError

GROUP = 1 << 17  # rows


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


def read(uri: str, split: str | None, sha256: str, columns: list[str]) -> pa.Table:
    """Some columns of all rows. Raises DataError where the file is missing or damaged."""
    storage, name = Storage(uri), file_name(split)
    found = storage.read_version(name)
    if found is None or hashlib.sha256(found[0]).hexdigest() != sha256:
        raise DataError(f"{storage.where(name)}: missing or damaged; make it anew with `unlearn shards index {uri}`")
    return pq.read_table(pa.BufferReader(found[0]), columns=columns)


def file_name(split: str | None) -> str:
    return f"manifest-{split}.rows" if split else "manifest.rows"
