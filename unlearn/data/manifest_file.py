"""manifest.json beside the shards, as it is stored: one for a folder, or one for each of its splits."""

import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from unlearn import documents
from unlearn.data import columns as roles
from unlearn.data import duplicates, row_values
from unlearn.data.manifest import Manifest
from unlearn.data.parquet_file import short
from unlearn.data.storage import Storage
from unlearn.errors import DataError

MANIFEST = "manifest.json"
ROWS = 1 << 31  # of one row group: Parquet writers stay far below
_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class RowFacts:
    """What is told of every row, in order. images: (rows,) checksums, see duplicates.py; values: see row_values.py."""

    images: np.ndarray
    values: pa.Table


def load(uri: str, split: str | None = None) -> Manifest:
    """Read the manifest of a folder, or of one split of it. Raises DataError, StorageError."""
    storage = Storage(uri)
    name = manifest_name(split)
    found = storage.read_version(name)
    if split is None and found is None:
        there = [
            n[len("manifest-") : -len(".json")] for n in storage.files() if re.fullmatch(r"manifest-[\w.-]+\.json", n)
        ]
        if len(there) > 1:
            raise DataError(f"{uri}: holds several splits: {', '.join(there)}; say which with `split`")
        split = there[0] if there else None
        name = manifest_name(split)
        found = storage.read_version(name) if there else None
    if found is None:
        option = f" --split {split}" if split else ""
        raise DataError(
            f"{uri}: no {name} there. Shards you already have: `unlearn shards index {uri}{option}`; "
            f"images: `unlearn shards build SRC {uri}`"
        )
    data, _ = found
    try:
        tree = documents.from_json(data)
        if not _is_manifest(tree):
            raise ValueError("it is another document")
        known = _MANIFEST.validate_python(tree | {"uri": storage.uri, "split": split})
        _check(known)
        if tree["hash"] != known.hash:
            raise ValueError("its hash is not that of its content")
        return known
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if not is_ours(data):
            raise DataError(
                f"{uri}/{name} is not of this program: rename it, then run `unlearn shards index {uri}`"
            ) from None
        raise DataError(
            f"{uri}/{name} is damaged ({short(e)}): make it anew with `unlearn shards index {uri}`"
        ) from None


def is_indexed(uri: str, split: str | None = None) -> bool:
    """Whether a folder, or this split of it, has a manifest written by this program."""
    storage = Storage(uri)
    wanted = re.escape(manifest_name(split)) if split else r"manifest(-[\w.-]+)?\.json"
    return any(re.fullmatch(wanted, name) and is_ours(storage.read(name)) for name in storage.files())


def save(manifest: Manifest, rows: RowFacts | None = None) -> Manifest:
    """Write the manifest beside the shards, and what is told of each row; returns the manifest as written."""
    storage = Storage(manifest.uri)
    if rows is not None:
        images = duplicates.write(storage, manifest.split, rows.images)
        values = row_values.write(storage, manifest.split, rows.values) if rows.values.num_columns else ""
        manifest = replace(manifest, images=images, values=values)
    storage.write(
        manifest_name(manifest.split), json.dumps(manifest.tree() | {"hash": manifest.hash}, indent=1).encode()
    )
    return manifest


def manifest_name(split: str | None) -> str:
    if split is not None and not re.fullmatch(r"[\w.-]+", split):
        raise DataError(f"{split!r} is no name of a split")
    return f"manifest-{split}.json" if split else MANIFEST


def is_ours(data: bytes) -> bool:
    """Whether this program wrote a manifest, intact or damaged. An empty file counts as its own: it can be
    overwritten."""
    try:
        return not data or _is_manifest(documents.from_json(data))
    except ValueError:
        return data.lstrip().startswith(b'{\n "columns": [')


def _is_manifest(tree: object) -> bool:
    return isinstance(tree, dict) and "shards" in tree and "columns" in tree


def _check(manifest: Manifest) -> None:
    """Raises ValueError where a shard lies out of the folder, for numbers that cannot be, and for columns of no use."""
    if wrong := set(manifest.columns) - set(roles.ROLES):
        raise ValueError(f"{min(wrong)[:80]!r} is no role of a column")
    for shard in manifest.shards:
        if shard.path.startswith("/") or ".." in shard.path.split("/") or "\0" in shard.path:
            raise ValueError(f"{shard.path[:80]!r} leads out of the folder")
        numbers, labels = [shard.bytes], [*shard.labels]
        for group in shard.row_groups:
            numbers += [group.rows, group.offset, group.bytes]
            labels += group.labels
            if group.rows > ROWS:
                raise ValueError(f"{shard.path}: a row group that cannot be")
        if min(numbers) < 0 or not all(-1 <= label < 1 << 63 for label in labels):
            raise ValueError(f"{shard.path}: sizes are 0 or more, and labels -1 or more")
