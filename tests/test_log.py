"""The log: sentences for people, JSON lines in jobs, and one clear message where UNLEARN_LOG is wrong."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command import refused
from support.images import tiny_table

from jobs.backends.base import error_line, warning_line
from unlearn import log
from unlearn.cli import console
from unlearn.errors import ConfigError


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The loggers afterwards as they were before, and an environment that says nothing."""
    before = {name: vars(logging.getLogger(name)).copy() for name in log.LOGGERS}
    monkeypatch.delenv(log.VARIABLE, raising=False)
    monkeypatch.delenv("UNLEARN_JOB", raising=False)
    yield
    for name, values in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = values["handlers"], values["propagate"]
        logger.setLevel(values["level"])


@pytest.mark.parametrize(
    ("variable", "job", "verbose", "wanted"),
    [
        ("", "", 0, ("warning", "text")), ("", "", 1, ("info", "text")), ("", "", 3, ("debug", "text")),
        ("info", "", 0, ("info", "text")), ("json", "", 0, ("warning", "json")),
        (" JSON, debug ", "", 0, ("debug", "json")),
        ("", "a-job", 0, ("info", "json")), ("text,warning", "a-job", 0, ("warning", "text")),
    ],
)  # fmt: skip
def test_what_is_wanted(monkeypatch, variable, job, verbose, wanted):
    monkeypatch.setenv(log.VARIABLE, variable)
    if job:
        monkeypatch.setenv("UNLEARN_JOB", job)
    assert log.wanted(verbose) == wanted


def test_a_wrong_value_is_one_message(told, monkeypatch):
    monkeypatch.setenv(log.VARIABLE, "info,loud")
    with pytest.raises(ConfigError, match="'loud' is neither a level"):
        log.wanted()
    assert "UNLEARN_LOG: 'loud' is neither a level" in refused(told, "methods")


def test_json_lines_of_a_job(capsys, monkeypatch):
    """One object a line, whatever the message holds; backends read why a driver ended from them."""
    monkeypatch.setenv("UNLEARN_JOB", "half-1234")
    log.start_worker("info", rank=1)
    logger = logging.getLogger("unlearn.training.loop")
    logger.debug("not this")
    logger.warning('a "quoted"\nmessage')
    logger.error("gone")
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in err.splitlines()]
    assert not out and [line["message"] for line in lines] == ['a "quoted"\nmessage', "gone"]
    assert {"time", "level", "logger", "message"} < set(lines[0]) and (lines[0]["rank"], lines[0]["job"]) == (
        1,
        "half-1234",
    )
    assert lines[0]["logger"] == logger.name and lines[0]["time"].endswith("+00:00")
    text = f"some line\n{err}report: x\n"
    assert error_line(text) == "error: gone" and warning_line(text).startswith('warning: a "quoted"')
    assert error_line("error: plain\nlast") == "error: plain"


def test_nothing_that_a_terminal_obeys_reaches_it(told, tmp_path, capsys, monkeypatch):
    """Escapes, back-spaces, changes of direction and bytes that are not UTF-8, in tables, sentences, errors and
    JSON."""
    raw = "\x1b]0;owned\x07\x1b[31m[red]\r\b\x9b1A\u202e\x7f\udcff"
    shown = r"\x1b]0;owned\x07\x1b[31m[red]\x0d\x08\x9b1A\u202e\x7f\udcff"
    assert log.visible(raw + "\ta\nb") == shown + "\ta\nb"
    name = raw.rstrip("\udcff")
    table = tiny_table(0, 2).set_column(1, "label", pa.array([name, "plain"]))
    pq.write_table(table, tmp_path / "a.parquet")
    for command in ("index", "inspect"):
        code, out, _ = told("shards", command, tmp_path)
        assert code == 0 and "x1b]0;owned" in "".join(out.split()) and not set(out) & set(raw) - set(shown)
    console.warn(raw)
    console.say(raw)
    assert refused(told, "shards", "inspect", f"/gone{raw}").count(shown) == 3
    monkeypatch.setenv(log.VARIABLE, "json")
    code, _, err = told("shards", "inspect", f"/gone{raw}")
    assert f"/gone{raw}" in _objects(err)[0]["message"] and not set(err) & set(raw) - set(shown)


def test_a_run_tells_its_stations(told, written, monkeypatch):
    """Sets and hashes, start, checkpoints, export; no id of an image, and on JSON nothing else on standard error."""
    monkeypatch.setenv(log.VARIABLE, "info,json")
    code, _, err = told(
        "pretrain", written("method.name=pretrain", "data.retain={ids: [img-020, img-021, img-022, img-023, img-024]}")
    )
    assert code == 0
    messages = [record["message"] for record in _objects(err)]
    for station in (
        "resolved: config",
        "5 images (manifest",
        "starts at step 1 of 4",
        "checkpoint of step 2 committed",
        "exported ",
    ):
        assert any(station in message for message in messages), (station, messages)
    assert "img-02" not in err


def _objects(text: str) -> list[dict]:
    """The JSON objects of a text that holds nothing else."""
    decoder, found = json.JSONDecoder(), []
    while text := text.strip():
        one, end = decoder.raw_decode(text)
        found.append(one)
        text = text[end:]
    return found
