"""Which images requests mean: what they name, as the `data.forget` of a configuration."""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from unlearn.config import Rows
from unlearn.data import selection
from unlearn.data.manifest import Manifest
from unlearn.errors import ConfigError
from unlearn.ledger.request import Request


@dataclass
class Selection:
    """forget: the rows of all requests together, None where there are none. By the number of a request: `matched`
    counts its images, `missing` has those of its values that no image has; `erased` are requests that nobody knows any
    more what they named."""

    forget: Rows | None = None
    matched: dict[int, int] = field(default_factory=dict)
    missing: dict[int, list] = field(default_factory=dict)
    erased: list[int] = field(default_factory=list)


def resolve(requests: Iterable[Request], manifest: Manifest) -> Selection:
    """Look up what the requests name. Requests of one kind give rows by subjects, ids or classes; mixed ones give rows
    by ids.

    Raises DataError or StorageError where the shards cannot be read.
    """
    chosen, values = Selection(), {kind: {} for kind in ("subjects", "ids", "classes")}
    named = {request.id: request.forget for request in requests}
    kinds = {kind for forget in named.values() if forget for kind in forget}
    table = manifest.table([role for role in ("id", "label", "subject") if role in manifest.columns]) if kinds else None
    there = {kind: _column(kind, manifest, table) for kind in kinds} if table is not None else {}
    counts = {kind: Counter(column) for kind, column in there.items()}
    for number, forget in named.items():
        if forget is None:
            chosen.erased.append(number)
            continue
        ((kind, given),) = forget.items()
        keys = {value: _key(kind, value, manifest) for value in given}
        images = {value: counts[kind][key] for value, key in keys.items()}
        values[kind] |= {value: keys[value] for value, count in images.items() if count}
        chosen.matched[number] = sum({keys[value]: count for value, count in images.items()}.values())
        if missing := [value for value, count in images.items() if not count]:
            chosen.missing[number] = missing
    matching = [kind for kind, named_values in values.items() if named_values]
    if len(matching) == 1:
        chosen.forget = Rows.model_validate({matching[0]: list(values[matching[0]])})
    elif matching and table is not None:
        wanted = {kind: set(values[kind].values()) for kind in matching}
        rows = [any(there[kind][i] in wanted[kind] for kind in matching) for i in range(len(table))]
        ids = selection.identity(manifest, table.filter(pa.array(np.array(rows))))
        chosen.forget = Rows(ids=list(dict.fromkeys(ids)))
    return chosen


def _column(kind: str, manifest: Manifest, table: pa.Table) -> list[Hashable]:
    """What each row is found by; nothing where the shards have no such column."""
    if kind == "ids":
        return list(selection.identity(manifest, table))
    role = {"subjects": "subject", "classes": "label"}[kind]
    return table[role].to_pylist() if role in table.column_names else [None] * len(table)


def _key(kind: str, value: int | str, manifest: Manifest) -> Hashable:
    """The value as it stands in the column; for a class that the shards do not have, one that stands nowhere."""
    if kind != "classes":
        return value
    try:
        return selection.label(manifest, value, "request")
    except ConfigError:
        return ("no such class", value)
