"""The manifest of a folder of shards: its row groups, their checksums, and reading them.

Rows are numbered across all shards, in the manifest's order.
"""

# pyarrow makes the functions of pyarrow.compute at import, so pyright knows none of them.
# pyright: reportAttributeAccessIssue=false

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unlearn.data import columns as roles
from unlearn.data import row_values
from unlearn.data.parquet_file import extent, forget, parquet, short
from unlearn.data.row_groups import RowGroup, RowGroups
from unlearn.data.storage import Storage
from unlearn.errors import DataError, ReplacedError, StorageError

READERS = 8  # files that are read at the same time for their labels and ids
SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.int64(),
        "id": pa.string(),
        "subject": pa.string(),
    }
)


@dataclass(frozen=True)
class Shard:
    """One Parquet file; `sha256` is of the whole file. labels: the folder's label for each of the file's; empty: they
    are the same."""

    __pydantic_config__ = {"arbitrary_types_allowed": True}  # RowGroups

    path: str
    bytes: int
    sha256: str
    row_groups: RowGroups
    labels: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return int(self.row_groups.facts["rows"].sum())

    def content(self) -> dict:
        """What counts for the hash of a manifest, as plain values."""
        groups = [{key: value for key, value in vars(group).items() if key != "checks"} for group in self.row_groups]
        tree = {"path": self.path, "bytes": self.bytes, "sha256": self.sha256, "row_groups": groups}
        return tree | ({"labels": self.labels} if self.labels else {})


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. columns: the roles that its columns fill; classes: name of label i, or empty where
    the names are not known; names: {role: column} where a column is not called as its role.

    images: sha256 of the file of image checksums (see duplicates.py); values: sha256 of the file of all other values
    (see row_values.py); both are empty where there is none. counts: {label: rows}; empty in older manifests, and where
    the classes are too many. split: the part of the folder that this is, if not all.
    """

    uri: str
    columns: list[str]
    classes: list[str]
    shards: list[Shard]
    names: dict[str, str] = field(default_factory=dict)
    images: str = ""
    values: str = ""
    counts: dict[int, int] = field(default_factory=dict)
    split: str | None = None

    @property
    def given(self) -> str:
        """The folder and its split, as commands take them."""
        return f"{self.uri} --split {self.split}" if self.split else self.uri

    @cached_property
    def groups(self) -> np.ndarray:
        """(n, 2): (shard, row group within it) of every row group."""
        counts = np.array([len(shard.row_groups) for shard in self.shards], np.int64)
        firsts = np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([np.repeat(np.arange(len(counts)), counts), np.arange(len(firsts)) - firsts], axis=1)

    @property
    def facts(self) -> np.ndarray:
        """(n,) what is known of every row group, see RowGroups."""
        return np.concatenate([RowGroups.of([]).facts, *(shard.row_groups.facts for shard in self.shards)])

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first row of every row group, and at the end the number of rows."""
        return np.cumsum(np.concatenate([[0], self.facts["rows"]]))

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def hash(self) -> str:
        """sha256 of the content as JSON with sorted keys, independent of its URI and of the file it was read from.
        Optional fields count only where they are present."""
        folder = {"columns": self.columns, "classes": self.classes} | ({"names": self.names} if self.names else {})
        digest = hashlib.sha256(json.dumps(folder, sort_keys=True)[:-1].encode())
        digest.update(b', "shards": [')  # the last key: one shard after another, as all of them take much memory
        for i, shard in enumerate(self.shards):
            digest.update(((", " if i else "") + json.dumps(shard.content(), sort_keys=True)).encode())
        digest.update(b"]}")
        return digest.hexdigest()

    def row_group(self, group: int) -> RowGroup:
        s, g = self.groups[group].tolist()
        return self.shards[s].row_groups[g]

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """The row group of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def shards_of(self, groups: Iterable[int]) -> list[int]:
        """The shards of row groups, each once."""
        return np.unique(self.groups[np.fromiter(groups, np.int64), 0]).tolist()

    @cached_property
    def repeated(self) -> Counter:
        """{class name: count} of names that occur more than once."""
        return Counter({name: count for name, count in Counter(self.classes).items() if count > 1})

    def class_name(self, label: int) -> str:
        """The name of a class, with its label where another has the same name; `class LABEL` where it has none."""
        if not 0 <= label < len(self.classes):
            return f"class {label}" if label >= 0 else "no class"
        name = self.classes[label]
        return f"{name} ({label})" if name in self.repeated else name

    def read(self, group: int, columns: list[str]) -> pa.Table:
        """Columns of one row group. Raises DataError where the shard does not match the manifest."""
        s, g = self.groups[group].tolist()
        return self._read(s, [g], columns)

    def table(self, columns: list[str], groups: Iterable[int] | None = None) -> pa.Table:
        """Columns of many row groups (all), with the row's number in a column `row`. Never used for images.

        Read from the file of all values where there is one, but for a single row group; else every shard is opened
        once, several at a time. Raises DataError where a shard does not match the manifest.
        """
        groups = range(len(self.groups)) if groups is None else list(groups)
        if self.values and columns and set(columns) <= set(self.columns) and len(groups) > 1:
            return self._of_values(columns, groups)
        wanted: dict[int, list[int]] = {}  # shard -> its row groups
        for s, g in self.groups[np.fromiter(groups, np.int64)].tolist():
            wanted.setdefault(s, []).append(g)
        if not wanted:
            return pa.schema([*(SCHEMA.field(name) for name in columns), pa.field("row", pa.int64())]).empty_table()
        if not columns:
            numbers = np.concatenate([np.arange(self.starts[group], self.starts[group + 1]) for group in groups])
            return pa.table({"row": numbers})
        with ThreadPoolExecutor(READERS) as pool:
            tables = dict(zip(wanted, pool.map(lambda s: self._read(s, wanted[s], columns), wanted), strict=True))
        parts, taken = [], dict.fromkeys(wanted, 0)
        for group in groups:  # in the requested order, which may alternate between files
            s, rows = int(self.groups[group, 0]), int(self.starts[group + 1] - self.starts[group])
            numbers = pa.array(np.arange(self.starts[group], self.starts[group + 1]))
            parts.append(tables[s].slice(taken[s], rows).append_column("row", numbers))
            taken[s] += rows
        return pa.concat_tables(parts, promote_options="permissive")

    def _of_values(self, columns: list[str], groups: Sequence[int]) -> pa.Table:
        self.check_shards(self.shards_of(groups))
        table = row_values.read(self.uri, self.split, self.values, columns)
        if len(table) != self.rows:
            raise DataError(
                f"{self.uri}: its file of values is of another manifest; run `unlearn shards index {self.given}`"
            )
        table = table.append_column("row", pa.array(np.arange(self.rows)))
        if len(groups) == len(self.groups) and list(groups) == sorted(groups):
            return table
        return pa.concat_tables(
            table.slice(int(self.starts[g]), int(self.starts[g + 1] - self.starts[g])) for g in groups
        )

    def check_shards(self, wanted: Iterable[int]) -> None:
        """Raises DataError where a shard has not the size that the manifest says, StorageError where it is not
        there."""
        sizes = Storage(self.uri).sizes([self.shards[s].path for s in wanted])
        for s in wanted:
            shard = self.shards[s]
            if sizes[shard.path] != shard.bytes:
                raise DataError(
                    f"{self.uri}/{shard.path}: not the file of the manifest ({sizes[shard.path]} bytes in place of "
                    f"{shard.bytes}); run `unlearn shards verify {self.given}`"
                )

    def _read(self, s: int, groups: list[int], columns: list[str]) -> pa.Table:
        """Columns of these row groups of one shard, in this order, checked against the manifest."""
        try:
            return self._read_once(s, groups, columns)
        except ReplacedError:  # since its footer was read; what counts is whether its values are those of the manifest
            forget(Storage(self.uri), self.shards[s].path, self.shards[s].sha256)
            return self._read_once(s, groups, columns)

    def _read_once(self, s: int, groups: list[int], columns: list[str]) -> pa.Table:
        shard, where = self.shards[s], f"{self.uri}/{self.shards[s].path}"
        if missing := [role for role in columns if role not in self.columns]:
            raise DataError(f"{self.uri}: its shards have no {' and no '.join(missing)}")
        known = {g: shard.row_groups[g] for g in groups}
        # Without checksums of its values a shard must at least be the one that was opened first.
        versions = None if all(group.checks for group in known.values()) else self.versions
        with _named(groups), parquet(Storage(self.uri), shard.path, shard.sha256, versions) as file:
            for g in groups:
                if file.num_row_groups != len(shard.row_groups) or extent(file, g) != (
                    known[g].rows,
                    known[g].offset,
                    known[g].bytes,
                ):
                    forget(Storage(self.uri), shard.path, shard.sha256)
                    raise DataError(
                        f"{where}: not the file of the manifest (row group {g}); run `unlearn shards verify "
                        f"{self.given}`"
                    )
            stored = {role: self.names.get(role, role) for role in columns}
            inside = [column for column in stored.values() if column in file.schema_arrow.names]
            table = _rows(file, groups, inside, where)
        if "image" in columns:
            self._check_bytes(shard, [known[g] for g in groups], where)
        values = {}
        for role, column in stored.items():
            if column in inside:
                values[role] = table[column]
            else:
                values[role] = roles.of_path(shard.path, column, role, sum(known[g].rows for g in groups), where)
            if role != "image":
                values[role] = roles.values(values[role], role, where)
        first = 0
        for g in groups:
            for role, column in values.items():
                part = column.slice(first, known[g].rows).chunks
                part = [roles.encoded(chunk) for chunk in part] if role == "image" else part
                if role in known[g].checks and roles.checksum(part) != known[g].checks[role]:
                    raise DataError(
                        f"{where}, row group {g}: the {role}s are not those of the manifest: the shard was replaced "
                        f"or is damaged; restore it, or make the manifest anew with `unlearn shards index {self.given}`"
                    )
            first += known[g].rows
        if "label" in values:
            values["label"] = self._own(shard, values["label"], where)
        return pa.table(values)

    def _check_bytes(self, shard: Shard, groups: list[RowGroup], where: str) -> None:
        """For manifests that have no checksums of values: checks the bytes of the row groups, for local files only
        (remote ones would be fetched twice)."""
        storage = Storage(self.uri)
        if all(group.checks for group in groups) or not storage.is_local():
            return
        with storage.open(shard.path) as file:
            for group in groups:
                file.seek(group.offset)
                if hashlib.sha256(file.read_buffer(group.bytes)).hexdigest() != group.sha256:
                    g = shard.row_groups.index(group)
                    raise DataError(
                        f"{where}, row group {g}: not the bytes of the manifest: the shard was replaced or is "
                        "damaged; restore it"
                    )

    def _own(self, shard: Shard, labels: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
        """The folder's labels for those of a file."""
        if pa.types.is_string(labels.type):
            labels = pc.index_in(labels, pa.array(self.classes, pa.string())).cast(pa.int64())
        elif shard.labels:
            own = pa.array(shard.labels, pa.int64())
            inside = pc.and_(pc.greater_equal(labels, 0), pc.less(labels, len(own)))
            labels = pc.take(own, pc.if_else(inside, labels, None))
        if labels.null_count:
            raise DataError(
                f"{where}: a label that the manifest does not know; run `unlearn shards index {self.given}`"
            )
        return labels if isinstance(labels, pa.ChunkedArray) else pa.chunked_array([labels])

    def values_of(self, stored: list[pa.Table]) -> pa.Table:
        """The columns but the image of all rows, of what each shard stores, with the labels of the folder."""
        parts = []
        for shard, table in zip(self.shards, stored, strict=True):
            table = table.select([role for role in self.columns if role in table.column_names])
            if "label" in table.column_names and len(table):
                where = f"{self.uri}/{shard.path}"
                labels = self._own(shard, table["label"], where)
                table = table.set_column(table.column_names.index("label"), "label", labels)
            parts += [table] if len(table) else []
        return pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})

    @cached_property
    def versions(self) -> dict[str, str]:
        """The versions of S3 objects that this process has opened, by name."""
        return {}

    def __getstate__(self) -> dict:
        """What is pickled: without cached values that are cheap to recompute."""
        cached = ("groups", "starts", "repeated", "versions")
        return {name: value for name, value in self.__dict__.items() if name not in cached}


@contextlib.contextmanager
def _named(groups: list[int]) -> Iterator[None]:
    """Say which row groups an error of the storage is about."""
    try:
        yield
    except StorageError as e:
        what = f"row group {groups[0]}" if len(groups) == 1 else f"row groups {groups[0]} to {groups[-1]}"
        raise type(e)(f"{what} of {e}") from None


def _rows(file: pq.ParquetFile, groups: list[int], columns: list[str], where: str) -> pa.Table:
    """Columns of these row groups. Raises DataError that names the first one that cannot be read."""
    try:
        return file.read_row_groups(groups, columns=columns)
    except (pa.ArrowException, OSError) as e:
        error = e
    for g in groups:
        try:
            file.read_row_group(g, columns=columns)
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{where}, row group {g}: unreadable ({short(e)}); restore the shard") from None
    raise DataError(f"{where}: unreadable ({short(error)}); try again") from None
