"""A file of row ids: a table (CSV, TSV, Parquet) with a column of them, or text with one a line.

What it holds is personal data: no message tells a value of it.
"""

# pyarrow makes the functions of pyarrow.compute at import, so pyright knows none of them.
# pyright: reportAttributeAccessIssue=false

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from unlearn.data import columns
from unlearn.data.storage import local_copy
from unlearn.errors import ConfigError, DataError

NAMES = ("id", "ids", "image_id", "row_id", "sample_id", "key")  # of the column, where none is given
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BLOCK = 1 << 20  # bytes of text that are parsed at a time
_NEVER = "\x1f"  # delimiter of a text of one column: in no id


@dataclass(frozen=True)
class Ids:
    """values: the distinct ids, as text. sha256: of the whole file."""

    values: pa.Array
    sha256: str


def read(uri: str, column: str | None, where: str) -> Ids:
    """The ids of a file here or on S3, whose suffix says what it is: .csv, .tsv, .parquet, .pq or .txt.

    column: which column holds them; else the one that is called as in NAMES. where: names the setting in messages.
    Only that column is held in memory. Raises ConfigError: no such column, unreadable, no id in it; StorageError.
    """
    with local_copy(uri) as path:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            parts = [pc.unique(part) for part in _parts(path, Path(uri).suffix.lower(), column, f"{where}: {uri}")]
        except (pa.ArrowException, DataError, OSError, UnicodeDecodeError):  # whose text may hold values
            raise ConfigError(
                f"{where}: {uri} cannot be read: a row of another number of columns, text that is not UTF-8, or damage"
            ) from None
    values = pc.unique(pa.chunked_array(parts, pa.string())).drop_null()
    if not len(values):
        raise ConfigError(f"{where}: {uri} holds no id")
    return Ids(values, digest)


def _parts(path: Path, suffix: str, column: str | None, where: str) -> Iterator[pa.Array]:
    """The ids piece by piece, as text."""
    if suffix in (".parquet", ".pq"):
        with pq.ParquetFile(path) as file:
            name = _column(file.schema_arrow.names, column, where)
            for batch in file.iter_batches(columns=[name]):
                yield from _text(pa.chunked_array([batch.column(0)]), where).chunks
    elif suffix in _DELIMITERS or suffix == ".txt":
        for batch in _opened(path, suffix, column, where):
            trimmed = pc.utf8_trim_whitespace(batch.column(0))
            yield pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    else:
        raise ConfigError(f"{where}: not known what it is: give a .csv, .tsv, .parquet or .txt file")


def _opened(path: Path, suffix: str, column: str | None, where: str) -> csv.CSVStreamingReader:
    """Batches of the one column of a text, which is never guessed to be of another type."""
    if not path.stat().st_size:
        raise ConfigError(f"{where} is empty")
    headers = None
    if suffix == ".txt":
        name, parsing = "id", csv.ParseOptions(delimiter=_NEVER, quote_char=False)
        headers = [name]
    else:
        parsing = csv.ParseOptions(delimiter=_DELIMITERS[suffix], newlines_in_values=True)
        with csv.open_csv(path, parse_options=parsing) as table:
            name = _column(table.schema.names, column, where)
    types = csv.ConvertOptions(include_columns=[name], column_types={name: pa.string()}, strings_can_be_null=False)
    return csv.open_csv(path, csv.ReadOptions(block_size=_BLOCK, column_names=headers), parsing, types)


def _column(names: list[str], column: str | None, where: str) -> str:
    known = {name.strip().lower(): name for name in names}
    found = [column] if column in names else [] if column else [known[name] for name in NAMES if name in known]
    if not found:
        wanted = f"no column {column!r}" if column else "no column that is plainly of ids (as `id`)"
        raise ConfigError(
            f"{where} has {wanted} among its {len(names)}: give its name in ids_column. A list without a header is a "
            ".txt file"
        )
    return found[0]


def _text(values: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """As the ids of shards are understood: whole numbers in decimal, UUIDs, bytes."""
    if not columns.texts(values.type):
        raise ConfigError(f"{where}: its ids are {values.type}: give text, whole numbers, UUIDs or bytes")
    return columns.values(values, "id", where)
