"""Requests and what becomes of them, on both databases; many writers; a process that is killed."""

import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from unlearn.errors import LedgerError
from unlearn.ledger import database, entry, letter, verification
from unlearn.ledger.ledger import Ledger, append
from unlearn.ledger.tables import disclosures, entries

# Not forked: threads that libraries have started in this process do not outlive that, and what they hold breaks.
ANEW = multiprocessing.get_context("spawn")


def subject(name: str, **more) -> dict:
    return {"forget": {"subjects": [name]}, **more}


def test_requests_are_recorded_and_followed(url):
    with Ledger(url, create=True) as ledger:
        asked = [subject("alice", reason="moved", due="2020-02-29"), {"forget": {"ids": ["a", "b", "a"]}}]
        assert ledger.add(asked, by="desk") == [1, 2] and ledger.add([{"forget": {"classes": [7, "cat"]}}]) == [3]
        assert [r.about() for r in ledger.pending()] == ["1 subject", "2 ids", "2 classes"]
        first, second, third = ledger.pending()
        assert first.is_overdue and first.about(show_keys=True) == "subjects: alice" and not second.is_overdue
        facts = {"cycle": "2026-12", "rows": 7}
        assert ledger.advance([1, 3], "scheduled", by="cycle", evidence=facts) == [1, 3]
        assert ledger.advance([1, 2, 3], "scheduled", by="cycle", evidence=facts) == [
            2
        ]  # a repeated call moves the rest
        assert ledger.advance(3, "received", by="cycle") == [3]  # the cycle failed: it waits again
        for state in ("trained", "verified", "released"):
            ledger.advance(1, state, by="cycle")
        ledger.advance(2, "withdrawn", by="desk", reason="changed her mind")
        assert [r.id for r in ledger.pending()] == [3] and ledger.request(3).due == third.due
        assert ledger.counts() == dict.fromkeys(ledger.counts(), 0) | {"received": 1, "released": 1, "withdrawn": 1}
        history = ledger.history(2)
        assert [(step["event"], step["private"]["by"]) for step in history] == [
            ("received", "desk"), ("scheduled", "cycle"), ("withdrawn", "desk"),
        ]  # fmt: skip
        assert history[1]["evidence"] == facts and history[2]["private"]["reason"] == "changed her mind"
        assert verification.verify(ledger).wrong == []


def test_a_change_that_is_not_allowed_changes_nothing(url):
    with Ledger(url, create=True) as ledger:
        ledger.add([subject("a"), subject("b")])
        ledger.advance(2, "rejected", reason="not ours")
        before = [line["leaf"] for line in ledger.export()]
        with pytest.raises(LedgerError, match="request 2 is rejected and cannot become scheduled: that is final"):
            ledger.advance([1, 2], "scheduled")
        with pytest.raises(
            LedgerError, match="request 1 is received and cannot become released: it can become scheduled"
        ):
            ledger.advance([1], "released")
        for number in (9, 0, 2**63, 10**30):  # the last two are more than a database can hold
            with pytest.raises(LedgerError, match=f"request {number}: there is none"):
                ledger.advance([1, number], "scheduled")
        with pytest.raises(LedgerError, match="cannot be written to the ledger"):
            ledger.advance(1, "scheduled", evidence={"loss": float("nan")})
        with pytest.raises(LedgerError, match="request 2 of 2: subjects: give a list"):
            ledger.add([subject("c"), subject(" ")])
        assert [line["leaf"] for line in ledger.export()] == before


def test_no_name_and_no_id_is_in_an_entry(url):
    with Ledger(url, create=True) as ledger:
        ledger.add([subject("alice", reason="stalked"), {"forget": {"ids": ["img-77"]}}], by="bob")
        ledger.advance(1, "rejected", by="carol", reason="unfounded")
        texts = "".join(line["document"] for line in ledger.export())
        assert not any(word in texts for word in ("alice", "stalked", "img-77", "bob", "carol", "unfounded"))
        shown = str(list(ledger.export(show_keys=True)))
        assert all(word in shown for word in ("alice", "stalked", "img-77", "bob", "carol", "unfounded"))
        again = ledger.add([subject("alice")])[0]  # the same request has another commitment: nobody can try names
        assert ledger.request(1).commitment != ledger.request(again).commitment


def test_the_database_refuses_to_change_entries(url):
    with Ledger(url, create=True) as ledger:
        ledger.add([subject("a")])
        row = (
            "(0, NULL, 'created', NULL, '{}', '')"
            if "://" not in url
            else "(0, NULL, 'created', NULL, '{}', ''::bytea)"
        )
        replace = f"INSERT OR REPLACE INTO ledger_entries VALUES {row}"
        upsert = f"INSERT INTO ledger_entries VALUES {row} ON CONFLICT (position) DO UPDATE SET event = 'x'"
        for statement in (
            "UPDATE ledger_entries SET event = 'released'", "DELETE FROM ledger_entries WHERE position = 1",
            replace if ledger.database.is_sqlite else "TRUNCATE ledger_entries", upsert,
        ):  # fmt: skip
            with (
                pytest.raises(LedgerError, match="the entries of a ledger are append-only"),
                ledger.database.writing() as connection,
            ):
                connection.exec_driver_sql(statement)
        assert verification.verify(ledger).wrong == []


def test_a_released_request_is_erased_only_where_its_images_are_said_to_be_gone(sqlite):
    with Ledger(str(sqlite), create=True) as ledger:
        ledger.add([subject("a"), subject("b")])
        for state in ("scheduled", "trained", "verified", "released"):
            ledger.advance(1, state)
        ledger.advance(2, "withdrawn")
        with pytest.raises(LedgerError, match="request 1 is released: every cycle must forget its images again"):
            ledger.erase([2, 1], "0d")
        assert ledger.request(2).forget, "all or none"
        assert ledger.erase([2], "0d") == [2] and ledger.gone() == set()
        assert ledger.erase([1, 2], "0d", images_gone=True) == [1, 2], "what was erased before is recorded as gone"
        assert ledger.erase([1, 2], "0d", images_gone=True) == [] and ledger.gone() == {1, 2}
        assert "images: have left the training data" in letter.write(ledger, 1)
        assert verification.verify(ledger).wrong == []


def test_what_a_request_names_is_erased_and_the_tree_stays(url):
    with Ledger(url, create=True) as ledger:
        ledger.add([subject("unforgettable", reason="because-of-this"), subject("b")], by="desk")
        with pytest.raises(LedgerError, match="request 1 is received: what it names is needed"):
            ledger.erase([1], "0d")
        ledger.advance(1, "withdrawn")
        with pytest.raises(LedgerError, match="the retention time of 30d is not over"):
            ledger.erase([1], "30d")
        root = verification.verify(ledger).walk.tree.root()
        assert ledger.erase([1], "0d", by="desk") == [1] and ledger.erase([1], "0d") == []
        report = verification.verify(ledger)
        assert report.wrong == [] and report.walk.tree.root(4) == root
        assert ledger.request(1).forget is None and ledger.request(2).forget == {"subjects": ["b"]}
        assert [step["private"] for step in ledger.history(1)][0] == {"by": "desk"}  # who did it stays
        with ledger.database.reading() as connection:
            texts = str(connection.execute(sa.select(disclosures.c.value)).all())
        assert "unforgettable" not in texts and "because-of-this" not in texts
        if ledger.database.is_sqlite:  # neither in the file nor in its log
            files = b"".join(path.read_bytes() for path in Path(url).parent.glob("ledger.sqlite*"))
            assert b"unforgettable" not in files and b"because-of-this" not in files


def _write(url: str, writer: int, numbers) -> None:
    with Ledger(url, create=True) as ledger:
        for i in range(3):
            numbers.put(ledger.add([subject(f"{writer}-{i}")])[0])
        ledger.advance(numbers.get(), "scheduled")


def test_sixteen_writers_lose_nothing(url):
    """They make the ledger, too."""
    numbers = ANEW.Queue()
    writers = [ANEW.Process(target=_write, args=(url, writer, numbers)) for writer in range(16)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 16
    with Ledger(url) as ledger:
        report = verification.verify(ledger)
        names = {request.forget["subjects"][0] for request in ledger.requests()}
        assert report.wrong == [] and report.walk.tree.size == 1 + 16 * 4
        assert names == {f"{writer}-{i}" for writer in range(16) for i in range(3)}
        assert ledger.counts()["scheduled"] == 16 and [r.id for r in ledger.requests()] == list(range(1, 49))


def _die(url: str) -> None:
    with Ledger(url) as ledger, ledger.database.writing() as connection:
        append(connection, [entry.Draft("withdrawn", number, private={"by": "x"}) for number in (1, 2)])
        assert len(connection.execute(sa.select(entries.c.position)).all()) == 5
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_in_mid_write_leaves_it_whole(url):
    with Ledger(url, create=True) as ledger:
        ledger.add([subject("a"), subject("b")])
        root = verification.verify(ledger).walk.tree.root()
        ledger.database.close()
        victim = ANEW.Process(target=_die, args=(url,))
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        report = verification.verify(ledger)
        assert report.wrong == [] and report.walk.tree.root() == root
        assert ledger.advance([1, 2], "scheduled") == [1, 2]


def test_a_writer_that_waits_too_long_is_told_so(url, monkeypatch):
    monkeypatch.setattr(database, "PATIENCE", 1)
    with Ledger(url, create=True) as ledger, Ledger(url) as other, ledger.database.writing():
        assert other.requests() == []  # reading waits for nobody
        with pytest.raises(LedgerError, match="others have been writing for 1 s; try again"):
            other.add([subject("a")])


def test_the_file_is_its_owners_alone(sqlite):
    with pytest.raises(LedgerError, match="there is no ledger yet; `unlearn request add` makes it"):
        Ledger(str(sqlite))
    assert not sqlite.exists()
    with Ledger(f"sqlite:///{sqlite}", create=True) as ledger:
        ledger.add([subject("a")])
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in sqlite.parent.glob("ledger.sqlite*")}
        assert set(modes.values()) == {0o600} and "ledger.sqlite-wal" in modes


def test_a_ledger_that_cannot_be_written_is_told(sqlite):
    with Ledger(str(sqlite), create=True) as ledger:
        with pytest.raises(LedgerError, match="this user cannot write there"), ledger.database.writing() as connection:
            connection.exec_driver_sql("PRAGMA query_only = ON")  # as a file without the right to write; root has all
            append(connection, [entry.Draft("received", 1, private={"by": "x"})])


def test_which_ledger_is_meant(tmp_path, monkeypatch):
    monkeypatch.delenv(database.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert database.place().database == str(tmp_path / "unlearn/ledger.sqlite")
    monkeypatch.setenv(database.VARIABLE, "postgres://u:secret@h/d")
    assert database.place().drivername == "postgresql+psycopg" and database.place("a.db").database.endswith("/a.db")
    for wrong in ("mysql://u:secret@h/d", "http://u:secret@h", "sqlite://", "postgresql://u:secret@h:port/d"):
        with pytest.raises(LedgerError) as e:
            database.place(wrong)
        assert "secret" not in str(e.value)
    with pytest.raises(LedgerError) as e:
        Ledger("postgresql://u:secret@127.0.0.1:1/d")
    assert "127.0.0.1" in str(e.value) and "secret" not in str(e.value)
    (tmp_path / "no.sqlite").write_text("this is no database, but a text that is long enough to be read as one" * 20)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger(str(tmp_path / "no.sqlite"))


def test_a_ledger_of_a_later_version_is_left_alone(sqlite):
    folder = Path(database.__file__).with_name("migrations")
    assert ScriptDirectory(folder).get_current_head() == database.HEAD
    Ledger(str(sqlite), create=True).database.close()
    engine = sa.create_engine(f"sqlite:///{sqlite}")
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {database.VERSIONS} SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(LedgerError, match="written by a later version of unlearn"):
        Ledger(str(sqlite))
