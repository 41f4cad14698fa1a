"""Requests from a file: CSV with a header, or JSON lines, here or on S3.

    subject,ids,class,due,reason,by        {"ids": ["a", "b"], "due": "2026-12-31", "reason": "withdrew consent"}
    alice,,,2026-12-31,,desk               {"subject": "alice"}
    ,a;b,,,withdrew consent,               {"class": 7}

Each line names a subject, or ids, or a class; the rest may be missing. In CSV ids are separated by `;`, and a class
that is all digits is a label.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from unlearn import documents
from unlearn.data.storage import Storage
from unlearn.errors import LedgerError
from unlearn.ledger import dates
from unlearn.ledger.request import wanted

COLUMNS = ("subject", "ids", "class", "due", "reason", "by")


def read(uri: str, within: str | None = None) -> list[dict[str, Any]]:
    """The requests of a file, as `Ledger.add` takes them. within: the span until one is due that names no day, by
    default a month.

    Raises LedgerError, which names the first line that is wrong; StorageError where the file cannot be read.
    """
    lines = {".csv": _csv, ".jsonl": _json, ".ndjson": _json}.get(PurePosixPath(uri).suffix.lower())
    if lines is None:
        raise LedgerError(f"{uri}: name it .csv or .jsonl, so that it is known what it holds")
    try:
        text = Storage(uri).read().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise LedgerError(f"{uri}: not UTF-8 at byte {e.start}") from None
    due, requests = dates.due(None, within), []
    for number, row in lines(uri, text):
        try:
            requests.append(_request(row, due))
        except LedgerError as e:
            raise LedgerError(f"{uri} line {number}: {e}; nothing was imported") from None
    if not requests:
        raise LedgerError(f"{uri}: holds no request")
    return requests


def label(text: str) -> int | str:
    """A class as it is written on one line: a label where it is all digits, else a name."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else text


def _csv(uri: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_header(uri, list(reader.fieldnames or ()))
        for row in reader:
            if None in row or None in row.values():
                raise LedgerError(
                    f"{uri} line {reader.line_num}: not as many cells as the header; nothing was imported"
                )
            given = {name: cell.strip() for name, cell in row.items() if cell.strip()}
            if "ids" in given:
                given["ids"] = [one.strip() for one in given["ids"].split(";")]
            if "class" in given:
                given["class"] = label(given["class"])
            yield reader.line_num, given
    except csv.Error as e:
        raise LedgerError(f"{uri} line {reader.line_num}: {e}; nothing was imported") from None


def _check_header(uri: str, names: list[str]) -> None:
    """Raises LedgerError. A cell is repeated only where it is like a column: the first line of a file without a header
    names a person."""
    for place, name in enumerate(names, 1):
        if name not in COLUMNS:
            near = difflib.get_close_matches(name.strip().lower(), COLUMNS, n=1)
            hint = f" ({name!r}; did you mean {near[0]}?)" if near else ""
            raise LedgerError(
                f"{uri} line 1: column {place}{hint} is not known; the first line names the columns, with commas "
                f"between: {', '.join(COLUMNS)}"
            )
        if name in names[: place - 1]:
            raise LedgerError(f"{uri} line 1: column {name!r} is there twice; nothing was imported")


def _json(uri: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = documents.from_json(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(row) <= set(COLUMNS):
            raise LedgerError(
                f"{uri} line {number}: not a JSON object with keys of {', '.join(COLUMNS)}; nothing was imported"
            )
        yield number, row


def _request(row: dict[str, Any], due: str) -> dict[str, Any]:
    given = {"subjects": _list(row.get("subject")), "ids": row.get("ids"), "classes": _list(row.get("class"))}
    for name in ("due", "reason", "by"):
        if not isinstance(row.get(name) or "", str):
            raise LedgerError(f"{name}: not a text")
    day = dates.parse(row["due"], "due").isoformat() if row.get("due") else due
    return {"forget": wanted(given), "due": day, "reason": row.get("reason"), "by": row.get("by")}


def _list(value: Any) -> list | None:
    return None if value is None else [value]
