"""Every entry of a ledger held against its own hash, the one before it, what it discloses, and what may happen to a
request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from unlearn.errors import LedgerError
from unlearn.ledger import entry, states
from unlearn.ledger.entry import Disclosure
from unlearn.ledger.ledger import CHUNK, Ledger
from unlearn.ledger.tables import disclosures, entries
from unlearn.ledger.tree import WIDTH, Tree

TRIGGERS = {
    "sqlite": {"ledger_entries_update", "ledger_entries_delete", "ledger_entries_insert"},
    "postgresql": {"ledger_entries_change", "ledger_entries_truncate"},
}


@dataclass(frozen=True)
class Reseal:
    """A recorded restore from a backup. common: how many entries the backup shares with what was lost; checkpoints:
    (size, root) of those that hold no longer."""

    position: int
    at: str
    common: int
    checkpoints: frozenset[tuple[int, str]]


@dataclass
class Walk:
    """What the walk saw. named: positions that `wrong` names; last: the highest number of a request."""

    ledger: str = ""
    last: int = 0
    tree: Tree = field(default_factory=Tree)
    reseals: list[Reseal] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    named: set[int] = field(default_factory=set)

    def blame(self, position: int, text: str) -> None:
        """Name an entry, once."""
        if position not in self.named:
            self.named.add(position)
            self.wrong.append(text)


def walk(ledger: Ledger) -> Walk:
    """Read the whole ledger in one transaction. Raises LedgerError where it cannot be read."""
    walker = _Walker()
    with ledger.database.reading() as connection:
        query = sa.select(entries).order_by(entries.c.position).execution_options(yield_per=CHUNK)
        for rows in connection.execute(query).partitions():
            walker.take(rows, _between(connection, rows[0].position, rows[-1].position))
        total = connection.execute(sa.select(sa.func.count()).select_from(disclosures)).scalar() or 0
        walker.finish(total, TRIGGERS[connection.dialect.name] - _triggers(connection))
    return walker.seen


class _Walker:
    def __init__(self) -> None:
        self.seen = Walk()
        self._next = self._shift = self._disclosed = 0
        self._previous = ""  # the leaf of the row before, in hex, as it is stored
        self._states: dict[int, str] = {}
        self._missing: list[tuple[int, int, str]] = []  # (position, request, field) of what is not disclosed any more
        self._erased: set[int] = set()

    def take(self, rows: Sequence[sa.Row], disclosed: dict[int, list[Disclosure]]) -> None:
        for row in rows:
            self._disclosed += len(own := disclosed.get(row.position, []))
            self._gap(row.position)
            self._entry(row, own)
            self._next, self._previous = row.position + 1, row.leaf.hex()

    def finish(self, disclosed: int, triggers: set[str]) -> None:
        seen = self.seen
        for position, request, name in self._missing:
            if request not in self._erased or name not in entry.PERSONAL:
                seen.wrong.append(
                    f"entry {position}: what stands behind its commitment `{name}` was removed, and no erasure is "
                    "recorded"
                )
        if disclosed != self._disclosed and not seen.wrong:
            seen.wrong.append(f"{disclosed - self._disclosed} disclosed values belong to no entry")
        if triggers:
            seen.wrong.append(f"the triggers that keep entries as they are were removed: {', '.join(sorted(triggers))}")
        if not seen.ledger:
            seen.wrong.append("entry 0: the first entry, which gives the ledger its identity, is not there")

    def _gap(self, position: int) -> None:
        """Missing rows leave their place in the tree, so that what follows stays comparable."""
        if position > self._next:
            last = f" to {position - 1}" if position - self._next > 1 else ""
            self.seen.wrong.append(f"entr{'ies' if last else 'y'} {self._next}{last}: removed")
            self.seen.named.update(range(self._next, position))
            self.seen.tree.leaves += bytes(WIDTH) * (position - self._next)

    def _entry(self, row: sa.Row, own: list[Disclosure]) -> None:
        seen, place = self.seen, row.position
        leaf = entry.leaf(row.document)
        seen.tree.leaves += leaf
        try:
            content = entry.parse(row.document)
            written, event, request = int(content["position"]), content["event"], content.get("request")
            if event not in entry.EVENTS:
                raise ValueError(f"{event!r} is no event")
        except (ValueError, KeyError, TypeError):
            seen.blame(place, f"{_named(row)}: changed, it cannot be read any more")
            return
        if leaf != row.leaf:
            seen.blame(place, f"{_named(row)}: changed, its content does not have its hash")
        if written - place != self._shift:
            self._shift = written - place
            if self._shift:
                seen.blame(place, f"entry {place}: removed or moved, here stands what was written as entry {written}")
        elif self._shift:
            seen.named.add(place)  # of a run of entries that stand too early or too late
        elif content.get("previous") != self._previous and self._next == place:
            seen.blame(place - 1, f"entry {place - 1}: replaced, entry {place} was written after another one")
        for column, value in (("request", request), ("event", event), ("due", content.get("due"))):
            if (stored := getattr(row, column)) != value:
                seen.blame(place, f"{_named(row)}: column `{column}` says {stored!r}, the hashed document {value!r}")
        if not self._shift:
            self._disclosures(place, content, own)
        self._event(place, event, content)

    def _disclosures(self, place: int, content: dict[str, Any], own: list[Disclosure]) -> None:
        commitments = dict(content.get("commitments") or {})
        for each in own:
            if commitments.pop(each.field, None) != each.commitment:
                self.seen.wrong.append(f"entry {place}: what stands behind its commitment `{each.field}` was changed")
        self._missing += [(place, content.get("request", 0), name) for name in commitments]

    def _event(self, place: int, event: str, content: dict[str, Any]) -> None:
        seen, request, facts = self.seen, content.get("request", 0), content.get("evidence", {})
        seen.last = max(seen.last, request)
        if event == entry.CREATED and place == 0:
            seen.ledger = str(facts.get("ledger", ""))
        elif event == entry.ERASED:
            self._erased.add(request)
        elif event == entry.RESEALED:
            lost = frozenset((each["size"], each["root"]) for each in facts["checkpoints"])
            seen.reseals.append(Reseal(place, content["at"], facts["common"], lost))
        elif event in states.STATES:
            try:
                if request in self._states:
                    states.check(request, self._states[request], event)
                elif event != states.RECEIVED:
                    raise LedgerError(f"request {request} was never received")
            except LedgerError as e:
                seen.blame(place, f"entry {place}: {e}")
            self._states[request] = event


def _named(row: sa.Row) -> str:
    return f"entry {row.position} ({row.event}{f', request {row.request}' if row.request is not None else ''})"


def _between(connection: sa.Connection, first: int, last: int) -> dict[int, list[Disclosure]]:
    found: dict[int, list[Disclosure]] = {}
    for row in connection.execute(sa.select(disclosures).where(disclosures.c.position.between(first, last))):
        found.setdefault(row.position, []).append(Disclosure(row.field, row.salt, row.value))
    return found


def _triggers(connection: sa.Connection) -> set[str]:
    if connection.dialect.name == "sqlite":
        query = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'ledger_entries'"
    else:
        query = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'ledger_entries'::regclass AND tgenabled <> 'D'"
    return set(connection.execute(sa.text(query)).scalars())
