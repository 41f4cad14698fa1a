"""The manifest as it is stored beside the shards: one for a folder, or one for each of its splits.

`manifest.row_groups` is a Parquet file with a row for each row group, without the suffix of one, so that nothing takes
it for data. Its metadata has a JSON document under the key `manifest`: what is said of the folder, and its shards, by
whose number in that list the column `shard` says where a row group is. Earlier versions wrote all of it to
`manifest.json`, which is still read where there is no other.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from unlearn import documents
from unlearn.data import columns as roles
from unlearn.data import duplicates, row_groups, row_values
from unlearn.data.manifest import Manifest
from unlearn.data.parquet_file import short
from unlearn.data.row_groups import RowGroup, RowGroups
from unlearn.data.storage import Storage
from unlearn.errors import DataError

MANIFEST, OLDER = "manifest.row_groups", "manifest.json"
ROWS = 1 << 31  # of one row group: Parquet writers stay far below
_NAME = re.compile(r"manifest(?:-([\w.-]+))?\.(?:row_groups|json)")
_KEY = b"manifest"
_SCHEMA = pa.schema([pa.field("shard", pa.int32()), *row_groups.SCHEMA])
_RANDOM = [name for name in _SCHEMA.names if name.startswith(("sha256", "check_"))]  # nothing makes them smaller
_MANIFEST, _ROW_GROUPS = TypeAdapter(Manifest), TypeAdapter(list[RowGroup])


@dataclass(frozen=True)
class RowFacts:
    """What is told of every row, in order. images: (rows,) checksums, see duplicates.py; values: see row_values.py."""

    images: np.ndarray
    values: pa.Table


def load(uri: str, split: str | None = None) -> Manifest:
    """Read the manifest of a folder, or of one split of it. Raises DataError, StorageError."""
    storage = Storage(uri)
    found = _stored(storage, split)
    if split is None and found is None:
        there = sorted({match[1] for name in storage.files() if (match := _NAME.fullmatch(name)) and match[1]})
        if len(there) > 1:
            raise DataError(f"{uri}: holds several splits: {', '.join(there)}; say which with `split`")
        split = there[0] if there else None
        found = _stored(storage, split) if there else None
    option = f" --split {split}" if split else ""
    if found is None:
        raise DataError(
            f"{uri}: no {manifest_name(split)} there. Shards you already have: `unlearn shards index {uri}{option}`; "
            f"images: `unlearn shards build SRC {uri}`"
        )
    name, data = found
    try:
        tree = _of_json(data) if name.endswith(".json") else _of_parquet(data)
        known = _MANIFEST.validate_python(tree | {"uri": storage.uri, "split": split})
        _check(known)
        if tree["hash"] != known.hash:
            raise ValueError("its hash is not that of its content")
        return known
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, pa.ArrowException, OSError) as e:
        what = f"is damaged ({short(e)}): make it anew with"
        if not _is_ours(name, data):
            what = "is not of this program; make one by"
        raise DataError(f"{uri}/{name} {what} `unlearn shards index {uri}{option}`") from None


def is_indexed(uri: str, split: str | None = None) -> bool:
    """Whether a folder, or this split of it, has a manifest written by this program."""
    storage = Storage(uri)
    there = [name for name in storage.files() if (match := _NAME.fullmatch(name)) and split in (None, match[1])]
    return any(_is_ours(name, storage.read(name)) for name in there)


def save(manifest: Manifest, rows: RowFacts | None = None) -> Manifest:
    """Write the manifest beside the shards, and what is told of each row; returns the manifest as written.

    One of an earlier version is deleted once this one is there: whoever still has that version is not to read it.
    """
    storage = Storage(manifest.uri)
    if rows is not None:
        images = duplicates.write(storage, manifest.split, rows.images)
        values = row_values.write(storage, manifest.split, rows.values) if rows.values.num_columns else ""
        manifest = replace(manifest, images=images, values=values)
    storage.write(manifest_name(manifest.split), _parquet(manifest))
    older = manifest_name(manifest.split, OLDER)
    if (before := storage.read_version(older)) and _is_ours(older, before[0]):
        storage.delete(older)
    return manifest


def manifest_name(split: str | None, name: str = MANIFEST) -> str:
    if split is not None and not re.fullmatch(r"[\w.-]+", split):
        raise DataError(f"{split!r} is no name of a split")
    return name.replace("manifest", f"manifest-{split}") if split else name


def is_manifest(name: str) -> bool:
    """Whether a file has the name of a manifest of a folder or a split, of this or of earlier versions."""
    return _NAME.fullmatch(name) is not None


def _is_ours(name: str, data: bytes) -> bool:
    """Whether this program wrote a manifest, intact or damaged. `manifest.json` may be a file of another one; an empty
    one counts as its own."""
    if not name.endswith(".json"):
        return True
    try:
        return not data or _is_manifest(documents.from_json(data))
    except ValueError:
        return data.lstrip().startswith(b'{\n "columns": [')


def _stored(storage: Storage, split: str | None) -> tuple[str, bytes] | None:
    """(name, content) of a manifest; that of an earlier version only where there is no other."""
    for name in (manifest_name(split), manifest_name(split, OLDER)):
        if found := storage.read_version(name):
            return name, found[0]
    return None


def _is_manifest(tree: object) -> bool:
    return isinstance(tree, dict) and "shards" in tree and "columns" in tree


def _of_json(data: bytes) -> dict:
    """What an earlier version wrote. Raises ValueError, KeyError, TypeError, OverflowError."""
    tree = documents.from_json(data)
    if not _is_manifest(tree):
        raise ValueError("it is another document")
    groups = (RowGroups.of(_ROW_GROUPS.validate_python(shard["row_groups"])) for shard in tree["shards"])
    return _with(tree, groups)


def _of_parquet(data: bytes) -> dict:
    """Raises ValueError, LookupError, TypeError, and what Arrow raises."""
    # Whatever it claims to hold: a document in it is no longer than itself, and a row takes more than a sha256. Arrow
    # reads as many rows as the parts of a column claim, not as many as the file does.
    file = pq.ParquetFile(
        pa.BufferReader(data), page_checksum_verification=True, thrift_string_size_limit=len(data) + 1,
        thrift_container_size_limit=len(data) + 1,
    )  # fmt: skip
    about = file.metadata
    parts = [about.row_group(g) for g in range(about.num_row_groups)]
    values = (sum(abs(part.column(c).num_values) for part in parts) for c in range(about.num_columns))
    if max(values, default=0) * row_groups.DIGEST > len(data):
        raise ValueError("more row groups than it has room for")
    if [file.schema_arrow.field(name).type for name in _SCHEMA.names] != _SCHEMA.types:
        raise ValueError("its columns are of other types")
    tree = documents.from_json((about.metadata or {})[_KEY])
    table = file.read(_SCHEMA.names, use_threads=False)
    groups, shard = RowGroups.of_table(table), np.array(table["shard"].to_pylist())
    places = np.arange(len(tree["shards"]) + 1)
    if table["shard"].null_count or np.any(np.diff(shard) < 0) or not np.isin(shard, places[:-1]).all():
        raise ValueError("a row group of no shard")
    bounds = np.searchsorted(shard, places).tolist()
    return _with(tree, [groups[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)])


def _with(tree: dict, groups: Iterable[RowGroups]) -> dict:
    """With the row groups of each shard."""
    return tree | {"shards": [s | {"row_groups": part} for s, part in zip(tree["shards"], groups, strict=True)]}


def _parquet(manifest: Manifest) -> bytes:
    optional = ("names", "images", "values", "counts")
    tree = {"hash": manifest.hash, "columns": manifest.columns, "classes": manifest.classes}
    tree |= {name: getattr(manifest, name) for name in optional if getattr(manifest, name)}
    tree["shards"] = [{k: v for k, v in vars(s).items() if k != "row_groups" and v != []} for s in manifest.shards]
    shard = pa.array(manifest.groups[:, 0], pa.int32())
    table = RowGroups(manifest.facts).table().add_column(0, _SCHEMA.field("shard"), shard)
    numbers, sink = [name for name in _SCHEMA.names if name not in _RANDOM], pa.BufferOutputStream()
    options: dict[str, Any] = {  # of compression, pyarrow declares one name for all columns, and takes one for each
        "compression": dict.fromkeys(numbers, "zstd") | dict.fromkeys(_RANDOM, "none"),
        "column_encoding": dict.fromkeys(numbers, "DELTA_BINARY_PACKED"), "use_dictionary": False,
        "write_statistics": False, "write_page_checksum": True, "store_schema": False,
    }  # fmt: skip
    with pq.ParquetWriter(sink, _SCHEMA, **options) as file:
        file.write_table(table)
        file.add_key_value_metadata({_KEY: json.dumps(tree).encode()})
    return sink.getvalue().to_pybytes()


def _check(manifest: Manifest) -> None:
    """Raises ValueError where a shard lies out of the folder, for numbers that cannot be, and for columns of no use."""
    if wrong := set(manifest.columns) - set(roles.ROLES):
        raise ValueError(f"{min(wrong)[:80]!r} is no role of a column")
    for shard in manifest.shards:
        if shard.path.startswith("/") or ".." in shard.path.split("/") or "\0" in shard.path:
            raise ValueError(f"{shard.path[:80]!r} leads out of the folder")
        facts = shard.row_groups.facts
        if (facts["rows"] > ROWS).any():
            raise ValueError(f"{shard.path}: a row group that cannot be")
        sizes = [shard.bytes, *(int(facts[name].min(initial=0)) for name in ("rows", "offset", "bytes"))]
        labels = [*shard.labels, *(int(facts[name].min(initial=0)) for name in ("min_label", "max_label"))]
        if min(sizes) < 0 or not all(-1 <= label < 1 << 63 for label in labels):
            raise ValueError(f"{shard.path}: sizes are 0 or more, and labels -1 or more")
