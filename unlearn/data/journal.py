"""What `unlearn shards index` has found in each shard, kept beside the shards until their manifest is written.

An index that was stopped goes on with the files that it has not read to their end. A file that has changed since, or is
asked for with other columns, is read anew.
"""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from unlearn.data.described import Described
from unlearn.data.facts import Facts
from unlearn.data.manifest import RowGroup, Shard
from unlearn.data.storage import Storage

FOLDER = "_index"  # no shard is below a name that begins so
_IMAGES = "\0images"  # column of the checksums: the name of no role


class Journal:
    """asked: everything but the shard that its description depends on, as plain values."""

    def __init__(self, storage: Storage, asked: dict):
        self._storage, self._asked = storage, json.loads(json.dumps(asked))
        self._there = set(storage.files(FOLDER))

    def get(self, name: str, facts: Facts) -> Described | None:
        """What was found in a shard; None where it is not known, or not of this version of it."""
        if _entry(name) not in self._there:
            return None
        try:
            with pa.ipc.open_file(pa.BufferReader(self._storage.read(_entry(name)))) as file:
                table = file.read_all()
            told = json.loads((table.schema.metadata or {})[b"described"])
            if told["of"] != [name, facts.size, facts.etag, self._asked]:
                return None
            shard = told["shard"]
            groups = [RowGroup(**group | {"labels": tuple(group["labels"])}) for group in shard["row_groups"]]
            values = table.drop_columns([_IMAGES]).replace_schema_metadata()
            return Described(
                Shard(**shard | {"row_groups": groups}), told["columns"], told["classes"], told["text"],
                [np.array(labels, np.int64) for labels in told["labels"]], table[_IMAGES].to_numpy(), values,
            )  # fmt: skip
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # damaged: it is only read once more
            return None

    def put(self, described: Described, facts: Facts) -> None:
        shard = described.shard
        told = {
            "of": [shard.path, facts.size, facts.etag, self._asked], "shard": asdict(shard),
            "columns": described.columns, "classes": described.classes, "text": described.text,
            "labels": [labels.tolist() for labels in described.labels],
        }  # fmt: skip
        values = {role: described.values[role] for role in described.values.column_names}
        table = pa.table(values | {_IMAGES: pa.array(described.images, pa.uint64())})
        table, sink = table.replace_schema_metadata({"described": json.dumps(told)}), pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        self._storage.write(_entry(shard.path), sink.getvalue().to_pybytes())

    def clear(self) -> None:
        """Delete all that is kept: the manifest says it now."""
        self._storage.delete(FOLDER)


def _entry(name: str) -> str:
    return f"{FOLDER}/{hashlib.sha256(name.encode()).hexdigest()[:32]}.arrow"
