"""The columns of Parquet files from any source: which one holds the image, label, id and subject, and their values.

    image        bytes: binary of every kind, dictionary-encoded, or a struct with `bytes`
    label        whole numbers, also as floats, decimals, booleans or lists of one; or text, which names the class
    id, subject  text; whole numbers are written in decimal, UUIDs as UUIDs, fixed-size binary in hexadecimal, other
                 binary is UTF-8

A label, an id or a subject may also be a part of the path, as in `label=3/part-0.parquet` (hive partitions).
"""

# pyarrow makes the functions of pyarrow.compute at import, so pyright knows none of them.
# pyright: reportAttributeAccessIssue=false

import json
import urllib.parse
import zlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unlearn.errors import DataError

ROLES = ("image", "label", "id", "subject")
NONE = "none"  # in place of a column name: the role has no column
# Names accepted for the label where there is no `label`, in any case, if exactly one of them is there.
LABELS = (
    "label", "labels", "class", "class_id", "class_idx", "class_label", "class_name", "classes", "target", "category",
    "cls", "y", "fine_label", "coarse_label",
)  # fmt: skip
# Signatures of encoded images, at the first or the fifth byte: JPEG, PNG, GIF, WebP, BMP, TIFF, JPEG 2000, AVIF.
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\xff\x4f\xff\x51",
    b"jP  ",
    b"ftyp",
)


def partitions(path: str) -> dict[str, str]:
    """{column: value} of the parts KEY=VALUE of a path."""
    parts = (part.partition("=") for part in path.split("/")[:-1])
    return {urllib.parse.unquote(key): urllib.parse.unquote(value) for key, equals, value in parts if equals and key}


def find(parquet: pq.ParquetFile, path: str, given: dict[str, str], where: str) -> dict[str, str]:
    """{role: column} of a file; roles without a column are left out. given: the user's choice, NONE where the role is
    not wanted.

    Raises DataError where there is no image column, a column has another type than its role needs, or several could be
    meant.
    """
    schema, parts = parquet.schema_arrow, partitions(path)
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise DataError(f"{where}: has several columns called {twice!r}: write each under a name of its own")
    there = [*schema.names, *(key for key in parts if key not in schema.names)]
    for role, column in given.items():
        if column not in there and column != NONE:
            raise DataError(f"{where}: no column {column!r} for the {role}; it has {', '.join(there)}")
    columns = {role: given.get(role, role) for role in ROLES if given.get(role, role) in there}
    if "image" not in columns and (column := _only_image(parquet)) is not None:
        columns["image"] = column
    if "label" not in columns and given.get("label") != NONE:
        named = [name for name, feature in _features(schema).items() if name in there and _names(feature)]
        likely = named or [name for name in there if name.lower() in LABELS and name not in columns.values()]
        if len(likely) > 1:
            raise DataError(f"{where}: {' or '.join(likely)} may be the label; say which with --label-column")
        if likely:
            columns["label"] = likely[0]
    if (
        "image" not in columns
        or columns["image"] not in schema.names
        or not _holds_images(schema.field(columns["image"]).type)
    ):
        raise DataError(
            (
                f"{where}: needs a column `image` (binary, or struct with `bytes`), or another named with "
                "--image-column; found "
            )
            + ", ".join(f"{field.name} ({field.type})" for field in schema)
        )
    for role in ("label", "id", "subject"):
        kind = schema.field(columns[role]).type if columns.get(role) in schema.names else pa.string()
        if role in columns and not (_labels if role == "label" else texts)(kind):
            needs = "whole numbers, or class names as text" if role == "label" else "text, whole numbers or binary"
            raise DataError(
                f"{where}: column `{columns[role]}` is {kind}, and the {role} must be {needs}; write it so, or say "
                f"--{role}-column {NONE}"
            )
    return columns


def class_names(schema: pa.Schema, column: str) -> list[str]:
    """Names in the metadata that Hugging Face's `datasets` writes for a ClassLabel; [] where there are none."""
    return _names(_features(schema).get(column))


def with_class_names(schema: pa.Schema, names: list[str]) -> pa.Schema:
    """The schema with the names of the column `label` in its metadata, as `datasets` writes and reads them."""
    if not names:
        return schema
    texts = {name: {"dtype": "string", "_type": "Value"} for name in ("id", "subject") if name in schema.names}
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}, **texts}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def values(column: pa.ChunkedArray, role: str, where: str) -> pa.ChunkedArray:
    """A column in the type of its role: label int64 or string, id and subject string, images as `encoded` gives them.

    Raises DataError for a value that cannot be converted.
    """
    try:
        if role == "image":
            chunks = [encoded(chunk) for chunk in column.chunks]
            return pa.chunked_array(chunks) if chunks else pa.chunked_array([], pa.binary())
        return _label(column, where) if role == "label" else _text(column)
    except pa.ArrowInvalid as e:
        raise DataError(f"{where}: column of the {role}: {' '.join(str(e).split())[:120]}") from None


def of_path(path: str, column: str, role: str, rows: int, where: str) -> pa.ChunkedArray:
    """The constant column given by a part of the path: text, or a number for a label of digits."""
    value = partitions(path).get(column)
    if value is None or value == "__HIVE_DEFAULT_PARTITION__":
        raise DataError(f"{where}: no value of `{column}` in its path")
    if role == "label" and value.isascii() and value.isdigit():
        value = value.lstrip("0")[:20] or "0"
        if int(value) >= 1 << 63:
            raise DataError(f"{where}: its path gives a label over 2^63 - 1")
        return pa.chunked_array([np.full(rows, int(value))])
    return pa.chunked_array([pa.array([value] * rows, pa.string())])


def encoded(chunk: pa.Array) -> pa.Array:
    """The encoded images of an array of any accepted type, as binary or large binary; null where there is none."""
    if pa.types.is_struct(chunk.type):
        chunk = chunk.field("bytes")
    if isinstance(chunk, pa.DictionaryArray):
        chunk = chunk.dictionary_decode()
    return (
        chunk
        if pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type)
        else chunk.cast(pa.large_binary())
    )


def checksum(chunks: Iterable[pa.Array]) -> str:
    """CRC-32 of the values of a column and of their lengths, in hexadecimal; independent of the storage type and
    chunking."""
    content = lengths = 0
    for chunk in chunks:
        if pa.types.is_integer(chunk.type):
            content = zlib.crc32(np.ascontiguousarray(chunk.to_numpy(zero_copy_only=False)).data, content)
            continue
        _, _, data = chunk.buffers()
        if len(ends := places(chunk)):
            content = zlib.crc32(memoryview(data or b"")[int(ends[0]) : int(ends[-1])], content)
            lengths = zlib.crc32(np.diff(ends).astype(np.int64).data, lengths)
    return f"{content:08x}{lengths:08x}"


def places(chunk: pa.Array) -> np.ndarray:
    """Where each value of a binary or text array begins in its bytes, and where the last one ends; none of an empty
    array."""
    if not len(chunk):
        return np.empty(0, np.int64)
    large = pa.types.is_large_binary(chunk.type) or pa.types.is_large_string(chunk.type)
    offsets = np.frombuffer(chunk.buffers()[1], np.int64 if large else np.int32)
    return offsets[chunk.offset : chunk.offset + len(chunk) + 1]


def _features(schema: pa.Schema) -> dict:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface") or "{}")["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _names(feature: object) -> list[str]:
    """Names of a ClassLabel, also where it is in a list of one element."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _binary(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _binary(field.type) for field in kind)
    return _binary(kind)


def _only_image(parquet: pq.ParquetFile) -> str | None:
    """The only column whose first value has the signature of an encoded image."""
    possible = [field.name for field in parquet.schema_arrow if _holds_images(field.type)]
    image_columns = []
    for name in possible:
        for g in range(parquet.num_row_groups):
            chunks = parquet.read_row_group(g, columns=[name])[name].chunks
            first = next((value.as_py() for chunk in chunks for value in encoded(chunk) if value.is_valid), None)
            if first is not None:
                image_columns += [name] if first.startswith(_SIGNATURES) or first[4:8] in _SIGNATURES else []
                break
    return (
        image_columns[0]
        if len(image_columns) == 1
        else possible[0]
        if len(possible) == 1 and not parquet.metadata.num_rows
        else None
    )


def _string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _labels(kind: pa.DataType) -> bool:
    if (
        pa.types.is_dictionary(kind)
        or pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
    ):
        return _labels(kind.value_type)
    return (
        _string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    )


def texts(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return texts(kind.value_type)
    whole = pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0)
    return _string(kind) or whole or _binary(kind) or isinstance(kind, pa.UuidType)


def _label(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _label(column.cast(kind.value_type), where)
    if column.null_count:
        raise DataError(f"{where}: {column.null_count} row(s) have no label; give every row one")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if len(column) and pc.min_max(pc.list_value_length(column)).as_py() != {"min": 1, "max": 1}:
            raise DataError(f"{where}: a row has several labels, or none; give every row one")
        return _label(pc.list_flatten(column), where)
    if _string(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind) and pc.any(pc.is_nan(column)).as_py():
        raise DataError(f"{where}: a row has no label (NaN); give every row one")
    return column.cast(pa.float64()).cast(pa.int64()) if kind == pa.float16() else column.cast(pa.int64())


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _text(column.cast(kind.value_type))
    if isinstance(kind, pa.UuidType):
        return pa.chunked_array([pa.array([None if v is None else str(v) for v in column.to_pylist()], pa.string())])
    if pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind):
        return pa.chunked_array([pa.array([None if v is None else v.hex() for v in column.to_pylist()], pa.string())])
    return column.cast(pa.string())
