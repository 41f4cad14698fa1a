"""The ledger of deletion requests: what is asked, when, by whom, and what became of it.

    with Ledger(url, create=True) as ledger:
        (number,) = ledger.add([{"forget": {"subjects": ["S"]}}], by="desk")
        ledger.advance(number, "scheduled", by="cycle", evidence={"cycle": "2026-12"})

Each call that writes is one transaction: all of it, or nothing.
"""

import getpass
import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

import sqlalchemy as sa

from unlearn.errors import LedgerError
from unlearn.ledger import dates, entry, states
from unlearn.ledger.database import Database
from unlearn.ledger.entry import Disclosure, Draft
from unlearn.ledger.request import Request, wanted
from unlearn.ledger.tables import disclosures, entries

CHUNK = 5000  # rows of one statement, numbers of one condition
GONE = "have left the training data"
HIGHEST = 2**63 - 1  # number that a database can hold


class Ledger:
    """A ledger by URL, else by UNLEARN_LEDGER, else the user's own. create: make it where there is none.

    Every method raises LedgerError where the database is out of reach or refuses.
    """

    def __init__(self, url: str | None = None, create: bool = False):
        self.database = Database(url, create)
        if create:
            self._start()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error: object) -> None:
        self.database.close()

    @property
    def name(self) -> str:
        """Where it lies, for messages; without a password."""
        return self.database.name

    def add(self, requests: Sequence[Mapping[str, Any]], by: str | None = None) -> list[int]:
        """Record requests, each {"forget": {"subjects" | "ids" | "classes": [...]}, "due": DATE, "reason": TEXT}, all
        or none; their numbers. due: by default in a month. by: who records it, by default the user of this process.

        Raises LedgerError, which names the first request that is wrong by its place.
        """
        due, who, drafts = dates.due(None, None), by or user(), []
        for place, given in enumerate(requests, 1):
            try:
                private = {"by": given.get("by") or who, "forget": wanted(given.get("forget") or {})}
                private |= {"reason": given["reason"]} if given.get("reason") else {}
                day = dates.parse(given["due"], "due").isoformat() if given.get("due") else due
            except LedgerError as e:
                raise LedgerError(f"request {place} of {len(requests)}: {e}" if len(requests) > 1 else str(e)) from None
            drafts.append(Draft(states.RECEIVED, due=day, private=private))
        with self.database.writing() as connection:
            first = (connection.execute(sa.select(sa.func.max(entries.c.request))).scalar() or 0) + 1
            numbered = [_numbered(draft, number) for number, draft in enumerate(drafts, first)]
            append(connection, numbered)
        return list(range(first, first + len(drafts)))

    def advance(
        self,
        ids: int | Iterable[int],
        state: str,
        evidence: Mapping[str, Any] | None = None,
        by: str | None = None,
        reason: str = "",
        own: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Move requests to `state`, all or none; those that moved. One that is there already by the same evidence is
        left as it is, so a call can be repeated. evidence: plain JSON, to be read by everyone; no name and no image id
        belongs into it. own: more of it, by number of the request.

        Raises LedgerError where a request is not there, or may not become that.
        """
        wanted_ids = [ids] if isinstance(ids, int) else list(dict.fromkeys(ids))
        facts = {number: {**(evidence or {}), **(own or {}).get(number, {})} for number in wanted_ids}
        private = {"by": by or user()} | ({"reason": reason} if reason else {})
        with self.database.writing() as connection:
            before = {request.id: request for request in _requests(connection, ids=wanted_ids)}
            moved = []
            for number in wanted_ids:
                if number not in before:
                    raise LedgerError(
                        f"request {number}: there is none of that number; see `unlearn request list --all`"
                    )
                if before[number].state == state and before[number].evidence == facts[number]:
                    continue
                states.check(number, before[number].state, state)
                moved.append(number)
            append(connection, [Draft(state, number, private=private, evidence=facts[number]) for number in moved])
        return moved

    def pending(self) -> list[Request]:
        """Requests that are neither released nor rejected nor withdrawn, the earliest first."""
        return self.requests(states.OPEN)

    def requests(self, of: Collection[str] | None = None, ids: Iterable[int] | None = None) -> list[Request]:
        """Requests in one of these states, or with these numbers, by number. Without conditions: all."""
        with self.database.reading() as connection:
            return list(_requests(connection, of, None if ids is None else list(ids)))

    def request(self, number: int) -> Request:
        """Raises LedgerError where there is none of that number."""
        if not (found := self.requests(ids=[number])):
            raise LedgerError(f"request {number}: there is none of that number; see `unlearn request list --all`")
        return found[0]

    def history(self, number: int) -> list[dict[str, Any]]:
        """What happened to a request, in order: the content of each entry, and in `private` what its commitments stand
        for."""
        with self.database.reading() as connection:
            rows = connection.execute(
                sa.select(entries.c.position, entries.c.document)
                .where(entries.c.request == number)
                .order_by(entries.c.position)
            ).all()
            private = _private(connection, [row.position for row in rows])
        return [entry.parse(row.document) | {"private": private.get(row.position, {})} for row in rows]

    def counts(self) -> dict[str, int]:
        """Requests by state; every state is there."""
        latest, current = _latest(), entries.alias()
        query = (
            sa.select(current.c.event, sa.func.count())
            .join(latest, current.c.position == latest.c.last)
            .group_by(current.c.event)
        )
        with self.database.reading() as connection:
            return dict.fromkeys(states.STATES, 0) | {event: count for event, count in connection.execute(query)}

    def gone(self) -> set[int]:
        """Numbers of erased requests whose images have left the training data, as whoever erased them has said."""
        query = sa.select(entries.c.request, entries.c.document).where(entries.c.event == entry.ERASED)
        with self.database.reading() as connection:
            rows = connection.execute(query).all()
        return {row.request for row in rows if "images" in entry.parse(row.document).get("evidence", {})}

    def erase(self, ids: Iterable[int], retention: str, by: str | None = None, images_gone: bool = False) -> list[int]:
        """Delete what these requests name and why, all or none; those that were not erased before, or of which it was
        not known that their images are gone. The tree stays as it is.

        retention: the span, as in 3y, that must have passed since the request was closed. images_gone: the images have
        left the training data, without which no released request is erased; it is recorded. Raises LedgerError where a
        request is open, or is released and its images may be there, and where the retention time is not over.
        """
        known = self.gone()
        limit, numbers, erased = dates.after(dates.today(), retention, "retention", -1), list(dict.fromkeys(ids)), []
        with self.database.writing() as connection:
            before = {request.id: request for request in _requests(connection, ids=numbers)}
            for number in numbers:
                if number not in before:
                    raise LedgerError(
                        f"request {number}: there is none of that number; see `unlearn request list --all`"
                    )
                request = before[number]
                if request.is_open:
                    raise LedgerError(
                        f"request {number} is {request.state}: what it names is needed until it is closed"
                    )
                if (closed := date.fromisoformat(request.changed[:10])) > limit:
                    raise LedgerError(
                        f"request {number} was closed on {closed}: the retention time of {retention} is not over"
                    )
                if request.state == states.RELEASED and request.forget is not None and not images_gone:
                    raise LedgerError(
                        f"request {number} is released: every cycle must forget its images again while they are in the "
                        "training data, and once it is erased nobody knows which they are. Keep it until they have "
                        "left the data and the base was trained without them; then say so with --images-gone"
                    )
                if request.forget is not None or (images_gone and number not in known):
                    erased.append(number)
            private, facts = {"by": by or user()}, {"images": GONE} if images_gone else {}
            append(connection, [Draft(entry.ERASED, number, private=private, evidence=facts) for number in erased])
            for some in _chunks(erased):
                own = sa.select(entries.c.position).where(entries.c.request.in_(some))
                connection.execute(
                    disclosures.delete().where(disclosures.c.position.in_(own), disclosures.c.field.in_(entry.PERSONAL))
                )
        self.database.purge(disclosures.name)
        return erased

    def export(self, show_keys: bool = False) -> Iterator[dict[str, Any]]:
        """Every entry in order: {"document": text, "leaf": hex}; with `show_keys` also "disclosures": {field: [salt,
        value]}."""
        with self.database.reading() as connection:
            query = sa.select(entries.c.position, entries.c.document, entries.c.leaf).order_by(entries.c.position)
            for rows in connection.execution_options(yield_per=CHUNK).execute(query).partitions():
                private = _disclosed(connection, [row.position for row in rows]) if show_keys else {}
                for row in rows:
                    own = {each.field: [each.salt, json.loads(each.value)] for each in private.get(row.position, [])}
                    line = {"document": row.document, "leaf": row.leaf.hex()}
                    yield line | ({"disclosures": own} if show_keys else {})

    def _start(self) -> None:
        """The first entry, which gives the ledger its identity."""
        with self.database.reading() as connection:
            if _last(connection) is not None:
                return
        with self.database.writing() as connection:
            if _last(connection) is None:
                append(connection, [Draft(entry.CREATED, evidence={"ledger": str(uuid.uuid4())})])


def user() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def append(connection: sa.Connection, drafts: Sequence[Draft]) -> int:
    """Append entries within a transaction of `Database.writing`; the position of the last one."""
    last = _last(connection)
    position, previous = (last.position, last.leaf.hex()) if last else (-1, "")
    for some in _chunks(drafts):
        rows, private = [], []
        for draft in some:
            position += 1
            own = entry.disclose(draft.private)
            text = entry.document(draft, position, previous, own)
            leaf = entry.leaf(text)
            previous = leaf.hex()
            rows.append(
                {
                    "position": position,
                    "request": draft.request,
                    "event": draft.event,
                    "due": draft.due,
                    "document": text,
                    "leaf": leaf,
                }
            )
            private += [
                {"position": position, "field": each.field, "salt": each.salt, "value": each.value} for each in own
            ]
        connection.execute(entries.insert(), rows)
        if private:
            connection.execute(disclosures.insert(), private)
    return position


def _last(connection: sa.Connection) -> Any:
    query = sa.select(entries.c.position, entries.c.leaf).order_by(entries.c.position.desc()).limit(1)
    return connection.execute(query).first()


def _numbered(draft: Draft, number: int) -> Draft:
    return Draft(draft.event, number, draft.due, draft.private, draft.evidence)


def _latest(ids: Collection[int] | None = None) -> sa.Subquery:
    """The position of the first and of the last state of each request."""
    positions = sa.func.min(entries.c.position).label("first"), sa.func.max(entries.c.position).label("last")
    query = (
        sa.select(entries.c.request, *positions).where(entries.c.event.in_(states.STATES)).group_by(entries.c.request)
    )
    return (query if ids is None else query.where(entries.c.request.in_(ids))).subquery()


def _requests(
    connection: sa.Connection, of: Collection[str] | None = None, ids: Sequence[int] | None = None
) -> Iterator[Request]:
    for some in [None] if ids is None else _chunks(sorted(number for number in ids if 0 < number <= HIGHEST)):
        latest, first, last = _latest(some), entries.alias(), entries.alias()
        query = (
            sa.select(latest.c.request, first.c.position, first.c.document, last.c.document.label("current"))
            .join(first, first.c.position == latest.c.first)
            .join(last, last.c.position == latest.c.last)
            .order_by(latest.c.request)
        )
        rows = connection.execute(query if of is None else query.where(last.c.event.in_(of))).all()
        forget = {}
        for positions in _chunks([row.position for row in rows]):
            named = sa.select(disclosures.c.position, disclosures.c.value).where(
                disclosures.c.position.in_(positions), disclosures.c.field == "forget"
            )
            forget |= {row.position: json.loads(row.value) for row in connection.execute(named)}
        for row in rows:
            received, current = entry.parse(row.document), entry.parse(row.current)
            yield Request(
                row.request, current["event"], received["at"], current["at"], received["due"], row.position,
                received["commitments"]["forget"], forget.get(row.position), current.get("evidence", {}),
            )  # fmt: skip


def _disclosed(connection: sa.Connection, positions: Sequence[int]) -> dict[int, list[Disclosure]]:
    """By position, what is behind the commitments of these entries."""
    found: dict[int, list[Disclosure]] = {}
    for some in _chunks(positions):
        for row in connection.execute(sa.select(disclosures).where(disclosures.c.position.in_(some))):
            found.setdefault(row.position, []).append(Disclosure(row.field, row.salt, row.value))
    return found


def _private(connection: sa.Connection, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
    found = _disclosed(connection, positions)
    return {position: {each.field: json.loads(each.value) for each in own} for position, own in found.items()}


def _chunks(values: Sequence) -> Iterator[Sequence]:
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
