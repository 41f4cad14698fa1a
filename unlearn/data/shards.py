"""Parquet shards and their manifest.

A shard is Parquet as image data sets on hubs have it: `image` (struct<bytes, path> or binary), `label` (integer), and
optionally `id` and `subject` (strings). `manifest.json` beside the shards lists every row group with its rows, bytes,
label range and checksum. Rows are numbered through all shards, in the manifest's order.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unlearn.data.storage import Storage, local_copy, told
from unlearn.errors import DataError

MANIFEST = "manifest.json"
READERS = 8  # files that are read at the same time for their labels and ids
SCHEMA = pa.schema(
    {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64(), "id": pa.string(), "subject": pa.string()}
)


@dataclass(frozen=True)
class RowGroup:
    """One row group: its rows, its bytes in the file, the smallest and largest label ((0, -1) without rows), sha256 of those bytes."""

    rows: int
    offset: int
    bytes: int
    labels: tuple[int, int]
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One Parquet file; `sha256` is of the whole file."""

    path: str
    bytes: int
    sha256: str
    row_groups: list[RowGroup]


Described = tuple[Shard, list[str], list[str]]  # a shard, the columns it has, the class names that its schema carries


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. classes: name of label i, or empty where the names are not known."""

    uri: str
    columns: list[str]
    classes: list[str]
    shards: list[Shard]

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(shard, row group within it) of every row group."""
        return [(s, g) for s, shard in enumerate(self.shards) for g in range(len(shard.row_groups))]

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first row of every row group, and at the end the number of rows."""
        return np.cumsum([0, *(self.shards[s].row_groups[g].rows for s, g in self.groups)])

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def hash(self) -> str:
        """sha256 of the content, wherever it is stored."""
        content = {k: v for k, v in asdict(self).items() if k != "uri"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """The row group of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def read(self, group: int, columns: list[str]) -> pa.Table:
        """Columns of one row group. Raises DataError where the shard is not what the manifest says."""
        s, g = self.groups[group]
        return self._read(s, [g], columns)

    def table(self, columns: list[str], groups: Iterable[int] | None = None) -> pa.Table:
        """Columns of many row groups (all), with the row's number in a column `row`. Never used for images.

        Every file is opened once, several at a time. Raises DataError where a shard is not what the manifest says.
        """
        groups = range(len(self.groups)) if groups is None else list(groups)
        wanted: dict[int, list[int]] = {}  # shard -> its row groups
        for s, g in (self.groups[group] for group in groups):
            wanted.setdefault(s, []).append(g)
        if not wanted:
            return pa.schema([*(SCHEMA.field(name) for name in columns), pa.field("row", pa.int64())]).empty_table()
        with ThreadPoolExecutor(READERS) as pool:
            tables = dict(zip(wanted, pool.map(lambda s: self._read(s, wanted[s], columns), wanted), strict=True))
        parts, taken = [], dict.fromkeys(wanted, 0)
        for group in groups:  # in the order that is asked for, which may go to and fro between files
            s, g = self.groups[group]
            rows = self.shards[s].row_groups[g].rows
            numbers = pa.array(np.arange(self.starts[group], self.starts[group + 1]))
            parts.append(tables[s].slice(taken[s], rows).append_column("row", numbers))
            taken[s] += rows
        return pa.concat_tables(parts, promote_options="permissive")

    def _read(self, s: int, groups: list[int], columns: list[str]) -> pa.Table:
        """Columns of these row groups of one shard, in this order."""
        shard, where = self.shards[s], f"{self.uri}/{self.shards[s].path}"
        with parquet(Storage(self.uri), shard.path) as file:
            known = shard.row_groups
            if file.num_row_groups != len(known) or any(file.metadata.row_group(g).num_rows != known[g].rows for g in groups):
                raise DataError(f"{where}: not the file of the manifest; run `unlearn shards verify {self.uri}`")
            try:
                return file.read_row_groups(groups, columns=columns)
            except (pa.ArrowException, OSError) as e:
                error = e
            for g in groups:
                try:
                    file.read_row_group(g, columns=columns)
                except (pa.ArrowException, OSError) as e:
                    raise DataError(f"{where}, row group {g}: unreadable ({_short(e)}); restore the shard") from None
        raise DataError(f"{where}: unreadable ({_short(error)}); try again") from None

    def __getstate__(self) -> dict:
        """What is pickled: not what is quickly computed again."""
        return {name: value for name, value in self.__dict__.items() if name not in ("groups", "starts")}


def images(table: pa.Table) -> Iterator[memoryview]:
    """The encoded images of a table read with column `image`; an empty view where the image is null."""
    for chunk in table.column("image").chunks:
        column = chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk
        for value in column:
            buffer = value.as_buffer() if value.is_valid else None
            yield memoryview(buffer).cast("B") if buffer is not None else memoryview(b"")


def load(uri: str) -> Manifest:
    """Read a manifest. Raises DataError, StorageError."""
    storage = Storage(uri)
    if not storage.is_file(MANIFEST):
        raise DataError(
            f"{uri}: no {MANIFEST} there. Shards you already have: `unlearn shards index {uri}`; images: `unlearn shards build SRC {uri}`"
        )
    try:
        tree = json.loads(storage.read(MANIFEST))
        shards = [
            Shard(**{**s, "row_groups": [RowGroup(**{**g, "labels": tuple(g["labels"])}) for g in s["row_groups"]]})
            for s in tree["shards"]
        ]
        manifest = Manifest(storage.uri, tree["columns"], tree["classes"], shards)
        if tree["hash"] != manifest.hash:
            raise ValueError("its hash is not that of its content")
        return manifest
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{uri}/{MANIFEST} is damaged ({_short(e)}): make it anew with `unlearn shards index {uri}`") from None


def index(uri: str) -> Manifest:
    """Make the manifest of shards that are already there, and write it. Nothing is converted."""
    storage = Storage(uri)
    names = [n for n in storage.files() if n.endswith(".parquet")]
    if not names:
        raise DataError(f"{uri}: no .parquet file there")
    described = []
    for name in names:
        with local_copy(storage.where(name)) as path:
            described.append(describe(path, name, storage.where(name)))
    manifest = collect(storage.uri, described)
    save(manifest)
    return manifest


def collect(uri: str, described: list[Described], classes: list[str] | None = None) -> Manifest:
    """The manifest of shards that `describe` has described; classes: instead of the names that the shards carry."""
    columns = [c for c in SCHEMA.names if all(c in has for _, has, _ in described)]
    classes = next((names for _, _, names in described if names), []) if classes is None else classes
    return Manifest(uri, columns, classes, [shard for shard, _, _ in described])


def save(manifest: Manifest) -> None:
    """Write manifest.json beside the shards."""
    tree = {k: v for k, v in asdict(manifest).items() if k != "uri"} | {"hash": manifest.hash}
    Storage(manifest.uri).write(MANIFEST, json.dumps(tree, indent=1).encode())


def parquet(storage: Storage, name: str) -> pq.ParquetFile:
    """Open a shard. Raises DataError where it is not Parquet."""
    return _parquet(storage.open(name), storage.where(name), pre_buffer=not storage.is_local())


def describe(path: Path, name: str, where: str) -> Described:
    """What the manifest is to say of the local Parquet file `path`; `where` names it in messages. Raises DataError."""
    with told(where), pa.memory_map(str(path)) as file, _parquet(file, where) as parquet, open(path, "rb") as whole:
        schema = parquet.schema_arrow
        image = schema.field("image").type if "image" in schema.names else None
        if image is None or not (pa.types.is_binary(image) or pa.types.is_large_binary(image) or pa.types.is_struct(image)):
            raise DataError(f"{where}: needs a column `image` (binary, or struct with `bytes`); found {schema.names}")
        if "label" not in schema.names or not pa.types.is_integer(schema.field("label").type):
            raise DataError(f"{where}: needs an integer column `label`; found {schema.names}")
        groups = [_describe_group(parquet, file, g, where) for g in range(parquet.num_row_groups)]
        shard = Shard(name, file.size(), hashlib.file_digest(whole, "sha256").hexdigest(), groups)
    return shard, [c for c in SCHEMA.names if c in schema.names], _class_names(schema)


def _parquet(file: pa.NativeFile, where: str, pre_buffer: bool = False) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=pre_buffer)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{where}: truncated, or not Parquet ({_short(e)}); restore the shard") from None


def _describe_group(parquet: pq.ParquetFile, file: pa.NativeFile, g: int, where: str) -> RowGroup:
    meta = parquet.metadata.row_group(g)
    chunks = [meta.column(c) for c in range(meta.num_columns)]
    offset = min(c.dictionary_page_offset or c.data_page_offset for c in chunks)
    size = sum(c.total_compressed_size for c in chunks)
    try:
        column = parquet.read_row_group(g, columns=["label"])["label"]
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{where}, row group {g}: unreadable ({_short(e)}); restore the shard") from None
    if column.null_count:
        raise DataError(f"{where}: {column.null_count} row(s) of row group {g} have no label; give every row one")
    labels = pc.min_max(column).as_py() if len(column) else {"min": 0, "max": -1}
    file.seek(offset)
    digest = hashlib.sha256(file.read_buffer(size)).hexdigest()
    return RowGroup(meta.num_rows, offset, size, (labels["min"], labels["max"]), digest)


def _class_names(schema: pa.Schema) -> list[str]:
    """Names in the metadata that Hugging Face's `datasets` writes for a ClassLabel."""
    text = (schema.metadata or {}).get(b"huggingface")
    if not text:
        return []
    try:
        return json.loads(text)["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return []


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
