"""One entry of the ledger: the document that is hashed, and the commitments in it.

    {"at": UTC, "commitments": {"by": sha256, ...}, "due": DATE, "event": "received", "evidence": {...}, "position": 12,
     "previous": leaf of entry 11, "request": 7}

in canonical JSON (RFC 8785). Who, why and what lie behind commitments, sha256 of [salt, field, value] in canonical
JSON, since they can name people; salt and value are in a table of their own, from which they can be deleted. `previous`
names an entry that was changed by hand where there is no checkpoint to compare with.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import rfc8785

from unlearn.errors import LedgerError
from unlearn.ledger.states import STATES

CREATED, ERASED, RESEALED = "created", "erased", "resealed"  # events beside the states of a request
EVENTS = (*STATES, CREATED, ERASED, RESEALED)
PERSONAL = ("forget", "reason")  # what is erased after the retention time; `by` stays


@dataclass(frozen=True)
class Draft:
    """An entry before it has a position. private: {field: value} that go behind commitments; evidence: plain JSON,
    readable for everyone who sees the ledger, for good."""

    event: str
    request: int | None = None
    due: str | None = None
    private: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Disclosure:
    """What one commitment stands for; value: canonical JSON."""

    field: str
    salt: str
    value: str

    @property
    def commitment(self) -> str:
        """Hex. Both texts are plain (hex, a word), so this is the canonical JSON of the three."""
        return hashlib.sha256(f'["{self.salt}","{self.field}",{self.value}]'.encode()).hexdigest()


def disclose(private: dict[str, Any]) -> list[Disclosure]:
    """Each private field under a fresh salt of 128 bits."""
    return [Disclosure(name, secrets.token_hex(16), canonical(value)) for name, value in private.items()]


def document(draft: Draft, position: int, previous: str, disclosures: list[Disclosure]) -> str:
    """The text that is stored and hashed. previous: hex of the leaf before, "" for the first."""
    content = {"position": position, "previous": previous, "at": now(), "event": draft.event}
    if draft.request is not None:
        content["request"] = draft.request
    if draft.due is not None:
        content["due"] = draft.due
    if disclosures:
        content["commitments"] = {each.field: each.commitment for each in disclosures}
    if draft.evidence:
        content["evidence"] = draft.evidence
    return canonical(content)


def leaf(text: str) -> bytes:
    """The hash of a document as a leaf of a Merkle tree (RFC 9162, 2.1.1), 32 bytes."""
    return hashlib.sha256(b"\0" + text.encode()).digest()


def canonical(value: Any) -> str:
    """Canonical JSON. Raises LedgerError for what JSON cannot hold."""
    try:
        return rfc8785.dumps(value).decode()
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError) as e:
        raise LedgerError(f"this cannot be written to the ledger: {' '.join(str(e).split())[:200]}") from None


def parse(text: str) -> dict[str, Any]:
    """The content of a document. Raises ValueError for what is none."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def now() -> str:
    """UTC to the millisecond, as in 2026-11-26T08:30:00.123Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
