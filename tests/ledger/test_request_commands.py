"""`unlearn request`: what it says, and what it refuses."""

import errno
import json
import os
from pathlib import Path

import pytest
from support.command import refused

from unlearn.ledger import database
from unlearn.ledger.ledger import Ledger


@pytest.fixture
def book(sqlite, monkeypatch) -> str:
    monkeypatch.setenv(database.VARIABLE, str(sqlite))
    return str(sqlite)


def test_a_request_from_its_receipt_to_its_erasure(told, book, tmp_path):
    assert "there is no ledger yet" in refused(told, "request", "list")
    (tmp_path / "ids.txt").write_text("\ufeffimg-1\r\n\r\nimg-2\r\n")
    code, out, err = told(
        "request", "add", "--subject", "alice", "--due", "2020-01-31", "--reason", "moved", "--by", "desk"
    )
    assert code == 0 and out == "request 1: received, due 2020-01-31\n" and "overdue from the start" in err
    code, out, _ = told("request", "add", "--ids", tmp_path / "ids.txt", "--within", "10d")
    assert code == 0 and "\n2 ids, the first is img-1\n" in out
    assert told("request", "add", "--class", "7")[0] == 0
    code, out, err = told("request", "list")
    assert "2020-01-31 OVERDUE" in out and "1 subject" in out and "2 ids" in out and "alice" not in out
    assert "3 requests, 1 overdue" in err and "alice" in told("request", "list", "--show-keys", "--overdue")[1]
    code, out, _ = told("request", "show", 1)
    assert "request 1: received, overdue, due 2020-01-31" in out and "by desk, reason: see --show-keys" in out
    assert "subjects: alice" in told("request", "show", 1, "--show-keys")[1]
    with Ledger(book) as ledger:
        for state in ("scheduled", "trained", "verified", "released"):
            ledger.advance(2, state, evidence={"release": "v2"})
    assert told("request", "withdraw", 1)[1] == "withdrawn: 1\n"
    assert told("request", "reject", 3, "--reason", "not in the data")[1] == "rejected: 3\n"
    assert "request 2 is released and cannot become withdrawn: that is final" in refused(told, "request", "withdraw", 2)
    assert told("request", "list")[2].strip() == "0 requests, 0 overdue"
    assert told("request", "list", "--state", "released")[1].count("released") == 1
    letter = told("request", "letter", 2)[1]
    assert "the 2 images that you named." in letter and "release: v2" in letter and "What we do not claim" in letter
    assert "img-1" not in letter and "img-1, img-2" in told("request", "letter", 2, "--show-keys")[1]
    assert "The reason: not in the data" in told("request", "letter", 3)[1]
    assert "the retention time of 3y is not over" in refused(told, "request", "erase", 1)
    assert told("request", "erase", 1, "--retention", "0d")[1] == "erased: 1\n"
    assert "erased" in told("request", "show", 1, "--show-keys")[1]
    assert "which has been erased" in told("request", "letter", 1)[1]
    figures = told("request", "metrics")[1]
    assert 'unlearn_requests{state="released"} 1\n' in figures and "unlearn_requests_pending 0\n" in figures
    code, out, err = told("request", "verify")
    assert code == 0 and "11 entries, every one is good" in out and "not held against any checkpoint" in err


def test_checkpoints_from_the_command_line(told, book, tmp_path, pair, tamper_sqlite):
    (private, public), place = pair("cli"), tmp_path / "place"
    told("request", "add", "--subject", "alice")
    assert "no checkpoint is there" in refused(told, "request", "verify", "--checkpoints", place, "--key", public)
    code, out, _ = told("request", "checkpoint", place, "--key", private)
    assert code == 0 and "checkpoint-000000000002-" in out and "2 entries" in out
    assert "which was there already" in told("request", "checkpoint", place, "--key", private)[1]
    assert "1 checkpoints hold" in told("request", "verify", "--checkpoints", place, "--key", public)[1]
    assert "belong together" in refused(told, "request", "verify", "--checkpoints", place)
    assert "is no private Ed25519 key" in refused(told, "request", "checkpoint", place, "--key", public)
    tamper_sqlite("DELETE FROM ledger_entries WHERE position = 1", "DELETE FROM ledger_disclosures")
    text = refused(told, "request", "verify", "--checkpoints", place, "--key", public)
    assert "the ledger is not what it was: entry 1: cut off, which the checkpoint of" in text
    assert told("request", "reseal", place, "--key", private, "--reason", "backup of Monday")[0] == 0
    assert "a backup of 1 entries was restored" in told("request", "verify", "--checkpoints", place, "--key", public)[1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["add"], "exactly one of them"),
        (["add", "--subject", "a", "--class", "b"], "exactly one of them"),
        (["add", "--subject", " "], "none of them empty"),
        (["add", "--subject", "a", "--due", "soon"], "due: 'soon' is no day; write it as in 2026-12-31"),
        (["add", "--subject", "a", "--within", "a month"], "within: 'a month' is no span of time; write it as 30d, 4w"),
        (["add", "--subject", "a", "--within", "1d", "--due", "2026-12-31"], "give one of them"),
        (["add", "--ids", "nowhere.txt"], "--ids nowhere.txt: No such file"),
        (["add", "--subject", "a", "--ledger", "mysql://h/d"], "the ledger's URL is not understood"),
        (["list", "--state", "done"], "--state done: the states are received"),
        (["import", "requests.xls"], "name it .csv or .jsonl"),
        (["reject", "1", "--reason", " "], "--reason: say why"),
        (
            ["add", "--subject", "a", "--ledger", "postgresql://u@127.0.0.1:1/d?password=hush"],
            "postgresql://u@127.0.0.1:1/d: ",
        ),
    ],
)
def test_mistakes_get_one_message(told, book, arguments, said):
    text = refused(told, "request", *arguments)
    assert said in text and "hush" not in text


def test_a_file_is_imported_whole_or_not_at_all(told, book, tmp_path):
    good = tmp_path / "good.csv"
    good.write_text('\ufeffsubject,ids,class,due,reason,by\n"a, b",,,2026-12-31,,desk\n,x; y,,,"two\nlines",\n,,7,,,\n')
    code, out, _ = told("request", "import", good, "--by", "clerk")
    assert code == 0 and out == "3 requests received: 1 to 3\n"
    lines = tmp_path / "good.jsonl"
    lines.write_text('{"subject": "c", "due": null}\n\n{"ids": ["z"], "due": "2027-01-01"}\n{"class": "cat"}\n')
    assert told("request", "import", lines, "--within", "2w")[1] == "3 requests received: 4 to 6\n"
    with Ledger(book) as ledger:
        named = [request.forget for request in ledger.requests()]
        assert named == [
            {"subjects": ["a, b"]}, {"ids": ["x", "y"]}, {"classes": [7]},
            {"subjects": ["c"]}, {"ids": ["z"]}, {"classes": ["cat"]},
        ]  # fmt: skip
        assert [ledger.history(number)[0]["private"]["by"] for number in (1, 2)] == ["desk", "clerk"]
        before = [line["leaf"] for line in ledger.export()]
    wrong = {
        "a.csv": ("subject,due\na,\nb,never\n", "a.csv line 3: due: 'never' is no day"),
        "b.csv": (
            "subject,Dew\na,\n",
            "b.csv line 1: column 2 ('Dew'; did you mean due?) is not known; the first line",
        ),
        "f.csv": ("jane doe,2026-12-31\n", "f.csv line 1: column 1 is not known; the first line names the columns"),
        "g.csv": ("subject,subject\na,b\n", "g.csv line 1: column 'subject' is there twice"),
        "c.csv": ("subject,class\na,\na\n", "c.csv line 3: not as many cells as the header"),
        "d.csv": ("subject,class\na,1\n", "d.csv line 2: a request names a subject"),
        "e.csv": ("subject\n", "holds no request"),
        "a.jsonl": ('{"subject": "a"}\n{"subject": 1}\n', "a.jsonl line 2: subjects: give a list"),
        "b.jsonl": ('{"subject": "a"}\n{"subject": \n', "b.jsonl line 2: not a JSON object"),
        "d.jsonl": ('{"subject": "a"}\n{"subject": "\\ud800"}\n', "d.jsonl line 2: not a JSON object"),
        "c.jsonl": ('{"ids": []}\n', "c.jsonl line 1: ids: give a list"),
    }
    for name, (text, said) in wrong.items():
        (tmp_path / name).write_text(text)
        assert said in refused(told, "request", "import", tmp_path / name)
    exported = tmp_path / "all.jsonl"
    assert told("request", "export", "--output", exported, "--show-keys")[0] == 0
    rows = [json.loads(line) for line in exported.read_text().splitlines()]
    assert [row["leaf"] for row in rows] == before and rows[4]["disclosures"]["forget"][1] == {"subjects": ["c"]}
    assert exported.stat().st_mode & 0o077 == 0 and "a, b" not in told("request", "export")[1]


def test_an_export_to_a_disk_that_cannot_be_written_is_told(told, book, tmp_path, monkeypatch):
    told("request", "add", "--subject", "alice")
    there = {"open": os.open, "unlink": Path.unlink}

    def denied(name):
        def call(path, *args, **kwargs):
            if "x.jsonl" in str(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return there[name](path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "open", denied("open"))
    monkeypatch.setattr(Path, "unlink", denied("unlink"))
    assert "x.jsonl: Read-only file system" in refused(told, "request", "export", "--output", tmp_path / "x.jsonl")


def test_a_file_of_ids_that_may_be_something_else_is_told(told, book, tmp_path):
    path = tmp_path / "ids.txt"
    for data, said in (
        ("img-1\n".encode("utf-16"), "not UTF-8: save it as UTF-8 text"),
        ("img-1\n".encode("utf-16-le"), "line 1: holds a NUL character: save it as UTF-8 text"),
    ):
        path.write_bytes(data)
        assert said in refused(told, "request", "add", "--ids", path)
    for text in ("img-1\nimg-2,img-3\n", 'img-1\n"img-2"\n'):
        path.write_text(text)
        code, _, err = told("request", "add", "--ids", path)
        assert code == 0 and "line 2: holds a comma or a quote, and is taken as one id" in err
    told("request", "add", "--subject", " alice ")
    with Ledger(book) as ledger:
        assert ledger.request(3).forget == {"subjects": ["alice"]}
