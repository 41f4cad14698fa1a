"""A deletion request as the ledger tells it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from unlearn.errors import LedgerError
from unlearn.ledger import dates, states

# What a request may name: a key of the `data.forget` of a configuration.
KINDS = ("subjects", "ids", "classes")


@dataclass(frozen=True)
class Request:
    """Where a request stands. received, changed: UTC; position: of its first entry; commitment: what stands for
    `forget` in it.

    forget: {"subjects": [...]}, {"ids": [...]} or {"classes": [...]}; None once it is erased.
    """

    id: int
    state: str
    received: str
    changed: str
    due: str
    position: int
    commitment: str
    forget: Mapping[str, list] | None
    evidence: Mapping[str, Any]

    @property
    def is_open(self) -> bool:
        return self.state in states.OPEN

    @property
    def is_overdue(self) -> bool:
        return self.is_open and date.fromisoformat(self.due) < dates.today()

    def about(self, show_keys: bool = False) -> str:
        """What it asks for; without names and ids unless `show_keys`."""
        if self.forget is None:
            return "erased"
        ((kind, values),) = self.forget.items()
        if show_keys:
            return f"{kind}: {', '.join(map(str, values))}"
        return f"{len(values)} {kind}" if len(values) > 1 else {"classes": "1 class"}.get(kind, f"1 {kind[:-1]}")


def wanted(given: Mapping[str, Any]) -> dict[str, list]:
    """What a request asks to forget, checked. given: one of KINDS with a list that is not empty. Raises LedgerError."""
    named = {kind: values for kind, values in given.items() if values is not None}
    if len(named) != 1 or not set(named) <= set(KINDS):
        raise LedgerError("a request names a subject, or ids, or a class: exactly one of them")
    ((kind, values),) = named.items()
    allowed = int | str if kind == "classes" else str
    right = isinstance(values, list) and all(isinstance(v, allowed) and not isinstance(v, bool) for v in values)
    if not right or not values or not all(str(value).strip() for value in values):
        raise LedgerError(
            f"{kind}: give a list of {'names or labels' if kind == 'classes' else 'texts'}, none of them empty"
        )
    return {kind: list(dict.fromkeys(values))}
