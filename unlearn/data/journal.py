"""What `unlearn shards index` has found in each shard, kept beside the shards until their manifest is written.

An index that was stopped goes on with the files that it has not read to their end, and in these with the row groups
that it has not read. A file that has changed since, or is asked for with other columns, is read anew.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from unlearn.data.described import Described, Found
from unlearn.data.facts import Facts
from unlearn.data.manifest import Shard
from unlearn.data.row_groups import RowGroup, RowGroups
from unlearn.data.storage import Storage

T = TypeVar("T")

FOLDER = "_index"  # no shard is below a name that begins so
_IMAGES = "\0images"  # column of the checksums: the name of no role


class Journal:
    """asked: everything but the shard that its description depends on, as plain values."""

    def __init__(self, storage: Storage, asked: dict):
        self._storage, self._asked = storage, json.loads(json.dumps(asked))
        self._there = set(storage.files(FOLDER))

    def get(self, name: str, facts: Facts) -> Described | None:
        """What was found in a shard; None where it is not known, or not of this version of it."""

        def described(told: dict, values: pa.Table, images: np.ndarray) -> Described:
            shard = told["shard"]
            groups = RowGroups.of(_row_group(group) for group in shard["row_groups"])
            labels = [np.array(labels, np.int64) for labels in told["labels"]]
            return Described(
                Shard(**shard | {"row_groups": groups}), told["columns"], told["classes"], told["text"], labels, images,
                values,
            )  # fmt: skip

        return self._known(name, [name, facts.size, facts.etag, self._asked], described)

    def put(self, described: Described, facts: Facts) -> None:
        shard, groups = described.shard, [vars(group) for group in described.shard.row_groups]
        told = {
            "of": [shard.path, facts.size, facts.etag, self._asked], "shard": vars(shard) | {"row_groups": groups},
            "columns": described.columns, "classes": described.classes, "text": described.text,
            "labels": [labels.tolist() for labels in described.labels],
        }  # fmt: skip
        self._keep(shard.path, told, described.values, described.images)

    def part(self, name: str, facts: Facts, groups: range) -> list[Found] | None:
        """What was found in these row groups of a shard that was not read to its end; None as in `get`."""

        def found(told: dict, values: pa.Table, images: np.ndarray) -> list[Found]:
            parts, first = [], 0
            for group, labels in zip(told["row_groups"], told["labels"], strict=True):
                row_group = _row_group(group)
                rows = slice(first, first := first + row_group.rows)
                own = np.array(labels, object if told["text"] else np.int64)
                parts.append((row_group, own, images[rows], values.slice(rows.start, row_group.rows)))
            return parts

        return self._known(f"{name}\0{groups}", self._of_part(name, facts, groups), found)

    def put_part(self, name: str, facts: Facts, groups: range, found: list[Found]) -> None:
        told = {
            "of": self._of_part(name, facts, groups), "row_groups": [vars(group) for group, *_ in found],
            "labels": [labels.tolist() for _, labels, *_ in found],
            "text": any(labels.dtype.kind == "O" for _, labels, *_ in found),
        }  # fmt: skip
        values, images = pa.concat_tables([values for *_, values in found]), [sums for _, _, sums, _ in found]
        self._keep(f"{name}\0{groups}", told, values, np.concatenate(images))

    def _of_part(self, name: str, facts: Facts, groups: range) -> list:
        return [name, facts.size, facts.etag, self._asked, groups.start, groups.stop]

    def _known(self, key: str, of: list, made: Callable[[dict, pa.Table, np.ndarray], T]) -> T | None:
        if _entry(key) not in self._there:
            return None
        try:
            with pa.ipc.open_file(pa.BufferReader(self._storage.read(_entry(key)))) as file:
                table = file.read_all()
            told = json.loads((table.schema.metadata or {})[b"described"])
            if told["of"] != of:
                return None
            return made(told, table.drop_columns([_IMAGES]).replace_schema_metadata(), table[_IMAGES].to_numpy())
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # damaged: it is only read once more
            return None

    def _keep(self, key: str, told: dict, values: pa.Table, images: np.ndarray) -> None:
        columns = {role: values[role] for role in values.column_names} | {_IMAGES: pa.array(images, pa.uint64())}
        table = pa.table(columns).replace_schema_metadata({"described": json.dumps(told)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        self._storage.write(_entry(key), sink.getvalue().to_pybytes())

    def clear(self) -> None:
        """Delete all that is kept: the manifest says it now."""
        self._storage.delete(FOLDER)


def _row_group(told: dict[str, Any]) -> RowGroup:
    return RowGroup(**{**told, "labels": tuple(told["labels"])})


def _entry(key: str) -> str:
    return f"{FOLDER}/{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
