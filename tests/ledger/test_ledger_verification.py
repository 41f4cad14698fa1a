"""What is done to a ledger behind its back is found and named; a restore from a backup is told from it."""

import json
import shutil

import pytest
import sqlalchemy as sa

from unlearn import certificate
from unlearn.data.storage import Storage
from unlearn.errors import LedgerError
from unlearn.ledger import entry, verification
from unlearn.ledger.ledger import Ledger
from unlearn.ledger.tables import entries

HINT = "where a backup was restored, record it with `unlearn request reseal`"


def filled(url: str, requests: int = 8) -> Ledger:
    """Entry 0, and one for each request."""
    ledger = Ledger(url, create=True)
    ledger.add([{"forget": {"subjects": [f"s{i}"]}, "due": "2030-01-01"} for i in range(requests)])
    return ledger


UP = [
    "UPDATE ledger_entries SET position = -position WHERE position > 3",
    "UPDATE ledger_entries SET position = -position - 1 WHERE position < 0",
]


SWAP = [f"UPDATE ledger_entries SET position = {b} WHERE position = {a}" for a, b in ((3, -1), (4, 3), (-1, 4))]
# {what is done: (statements, what is said first)}
DEEDS = {
    "a document": (
        ["UPDATE ledger_entries SET document = replace(document, '2030', '2040') WHERE position = 3"],
        "entry 3 (received, request 3): changed, its content does not have its hash",
    ),
    "no JSON": (
        ["UPDATE ledger_entries SET document = 'x' WHERE position = 3"],
        "entry 3 (received, request 3): changed, it cannot be read any more",
    ),
    "a column": (
        ["UPDATE ledger_entries SET event = 'released' WHERE position = 3"],
        "entry 3 (released, request 3): column `event` says 'released', the hashed document 'received'",
    ),
    "removed": (["DELETE FROM ledger_entries WHERE position IN (3, 4)"], "entries 3 to 4: removed"),
    "removed, and the others moved up": (
        ["DELETE FROM ledger_entries WHERE position = 3", *UP],
        "entry 3: removed or moved, here stands what was written as entry 4",
    ),
    "reordered": (SWAP, "entry 3: removed or moved, here stands what was written as entry 4"),
    "the first": (["DELETE FROM ledger_entries WHERE position = 0"], "entry 0: removed"),
    "a secret": (
        ["UPDATE ledger_disclosures SET value = '{\"subjects\":[\"x\"]}' WHERE position = 3 AND field = 'forget'"],
        "entry 3: what stands behind its commitment `forget` was changed",
    ),
    "a secret removed": (
        ["DELETE FROM ledger_disclosures WHERE position = 3 AND field = 'forget'"],
        "entry 3: what stands behind its commitment `forget` was removed, and no erasure is recorded",
    ),
    "a secret more": (
        ["INSERT INTO ledger_disclosures VALUES (99, 'forget', 'aa', '{}')"],
        "1 disclosed values belong to no entry",
    ),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_what_was_done_is_named_without_a_checkpoint(url, tamper, deed):
    statements, said = DEEDS[deed]
    with filled(url) as ledger:
        assert verification.verify(ledger).wrong == []
        tamper(*statements)
        assert verification.verify(ledger).wrong[0] == said


def test_a_removed_trigger_is_named(sqlite):
    with filled(str(sqlite)) as ledger:
        engine = sa.create_engine(f"sqlite:///{sqlite}")
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER ledger_entries_delete")
        engine.dispose()
        assert verification.verify(ledger).wrong == [
            "the triggers that keep entries as they are were removed: ledger_entries_delete"
        ]


def rewrite(ledger: Ledger, change, first: int, rest: bool) -> list[str]:
    """Statements that change entry `first` with its hash, and with `rest` all after it so that they follow each other
    again."""
    with ledger.database.reading() as connection:
        rows = connection.execute(sa.select(entries).order_by(entries.c.position)).all()
    statements, previous = [], rows[first - 1].leaf.hex()
    for row in rows[first:] if rest else [rows[first]]:
        content = json.loads(row.document) | {"previous": previous}
        text = entry.canonical(change(content) if row.position == first else content)
        previous = entry.leaf(text).hex()
        leaf = f"x'{previous}'" if ledger.database.is_sqlite else rf"'\x{previous}'"
        quoted = text.replace("'", "''")
        statements.append(
            f"UPDATE ledger_entries SET document = '{quoted}', leaf = {leaf} WHERE position = {row.position}"
        )
    return statements


def test_an_entry_that_was_replaced_with_its_hash_is_named_by_the_next_one(url, tamper):
    with filled(url) as ledger:
        tamper(*rewrite(ledger, lambda content: content | {"at": "2000-01-01T00:00:00Z"}, 3, rest=False))
        assert verification.verify(ledger).wrong == ["entry 3: replaced, entry 4 was written after another one"]


def test_a_step_that_was_not_allowed_is_named(sqlite, tamper_sqlite):
    with filled(str(sqlite)) as ledger:
        ledger.advance(1, "withdrawn")
        tamper_sqlite(*rewrite(ledger, lambda content: content | {"event": "released"}, 9, rest=True))
        tamper_sqlite("UPDATE ledger_entries SET event = 'released' WHERE position = 9")
        assert (
            verification.verify(ledger).wrong[0].startswith("entry 9: request 1 is received and cannot become released")
        )


def test_checkpoints_name_what_a_rewritten_history_hides(sqlite, tamper_sqlite, place, pair):
    private, public = (pair("a")[0], certificate.public_key(pair("a")[1]))
    with filled(str(sqlite)) as ledger:
        first, new = verification.checkpoint(ledger, place, certificate.private_key(private))
        assert (
            new and first.size == 9 and not verification.checkpoint(ledger, place, certificate.private_key(private))[1]
        )
        ledger.advance([1, 2], "scheduled")
        second, _ = verification.checkpoint(ledger, place, certificate.private_key(private))
        ledger.add([{"forget": {"classes": [1]}}])
        report = verification.verify(ledger, place, public)
        assert report.wrong == [] and [each.size for each in report.holding] == [9, 11]
        # every hash is right again, and the ledger alone has nothing to say
        tamper_sqlite(*rewrite(ledger, lambda content: content | {"due": "2031-01-01"}, 10, rest=True))
        tamper_sqlite("UPDATE ledger_entries SET due = '2031-01-01' WHERE position = 10")
        assert verification.verify(ledger).wrong == []
        report = verification.verify(ledger, place, public)
        assert report.wrong == [f"entry 10: changed since {second}"] and report.holding == [first]
        with pytest.raises(LedgerError, match="entry 10: changed"):
            verification.checkpoint(ledger, place, certificate.private_key(private))
        tamper_sqlite(*rewrite(ledger, lambda content: content | {"due": "2031-01-01"}, 3, rest=True))
        rewritten = f"entry 3 and all after it: rewritten since {second}; {HINT}"
        assert rewritten in verification.verify(ledger, place, public).wrong
        Storage(place).delete(second.leaves_name)  # without the leaves it is known, but not which entry
        assert any(
            text.startswith(second.leaves_name) and "one of the entries 0 to 10 is not what it was" in text
            for text in verification.verify(ledger, place, public).wrong
        )


def test_checkpoints_that_are_not_what_was_signed_are_named(sqlite, tmp_path, pair):
    place, (private, public) = str(tmp_path / "place"), pair("a")
    with filled(str(sqlite)) as ledger:
        first, _ = verification.checkpoint(ledger, place, certificate.private_key(private))
        ledger.advance(1, "scheduled")
        second, _ = verification.checkpoint(ledger, place, certificate.private_key(private))
        wrong = verification.verify(ledger, place, certificate.public_key(pair("b")[1])).wrong
        assert wrong == [f"{each.name}: not signed with this key, or changed since" for each in (first, second)]
        envelope = (tmp_path / "place" / first.name).read_text()
        (tmp_path / "place" / first.name).unlink()
        assert verification.verify(ledger, place, certificate.public_key(public)).wrong == [
            f"{first.name}: removed, {second.name} was written after it"
        ]
        (tmp_path / "place" / first.name).write_text(envelope.replace('"sig": "', '"sig": "AAAA'))
        (tmp_path / "place" / "checkpoint-x.json").write_text("[]")
        wrong = verification.verify(ledger, place, certificate.public_key(public)).wrong
        assert f"{first.name}: not signed with this key, or changed since" in wrong
        assert "checkpoint-x.json: damaged, it cannot be read" in wrong
    with Ledger(str(tmp_path / "other.sqlite"), create=True) as other:
        assert (
            f"{second.name}: of another ledger"
            in verification.verify(other, place, certificate.public_key(public)).wrong
        )


def test_a_restore_is_recorded_and_a_cut_is_not_taken_for_one(sqlite, tmp_path, place, pair, tamper_sqlite):
    (private, public), backup = pair("a"), tmp_path / "backup"
    signer, public = certificate.private_key(private), certificate.public_key(public)
    with filled(str(sqlite)) as ledger:
        first, _ = verification.checkpoint(ledger, place, signer)
    shutil.copy(sqlite, backup)
    with Ledger(str(sqlite)) as ledger:
        ledger.add([{"forget": {"classes": [1]}}] * 3)
        second, _ = verification.checkpoint(ledger, place, signer)
        with pytest.raises(LedgerError, match="agrees with every checkpoint"):
            verification.reseal(ledger, place, signer, "why")
    shutil.copy(backup, sqlite)
    with Ledger(str(sqlite)) as ledger:
        cut = [f"entries 9 to 11: cut off, which {second} has; {HINT}"]
        assert verification.verify(ledger, place, public).wrong == cut
        new = verification.reseal(ledger, place, signer, "disk lost", by="admin")
        report = verification.verify(ledger, place, public)
        assert (
            report.wrong == [] and report.holding == [first, new] and [each for each, _ in report.resealed] == [second]
        )
        assert ledger.add([{"forget": {"classes": [1]}}]) == [12]  # 9 to 11 were given to requests that are lost
        # an attacker can write the same entry, and has no key to sign it with
        Storage(place).delete(new.name)
        assert len(verification.verify(ledger, place, public).wrong) == 1
    shutil.copy(backup, sqlite)
    with Ledger(str(sqlite)) as ledger:  # restored, and gone on with before anyone noticed
        ledger.add([{"forget": {"classes": [1]}}])
        with pytest.raises(
            LedgerError, match="in its first 9 entries, and has 1 others since; .* say so with --restored 9"
        ):
            verification.reseal(ledger, place, signer, "disk lost")
        verification.reseal(ledger, place, signer, "disk lost", restored=9)
        assert verification.verify(ledger, place, public).wrong == []
    shutil.copy(backup, sqlite)
    with Ledger(str(sqlite)) as ledger:
        tamper_sqlite("UPDATE ledger_entries SET document = replace(document, '2030', '2040') WHERE position = 3")
        with pytest.raises(LedgerError, match="the ledger is not what it was:\n  entry 3"):
            verification.reseal(ledger, place, signer, "disk lost")
