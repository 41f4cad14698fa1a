"""A run folder has one owner: one of many that start at once, until it ends, dies or falls silent; who has lost it
hears so."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from unlearn import lease
from unlearn.data.storage import Storage
from unlearn.errors import LeaseError

HOLD = """
import sys
from unlearn import lease
from unlearn.errors import LeaseError
where, seconds, place = sys.argv[1:]
if place:
    lease._place = lambda: place  # as on another machine
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.held(where, f"run {place}", float(seconds)) as own:
        print("held", flush=True)
        sys.stdin.readline()
        own.check()
except LeaseError as e:
    print(e, flush=True)
"""


@pytest.fixture
def holder():
    """holder(uri, seconds=, place=) -> a process that takes the lease when it reads a line, and keeps it until the
    next."""
    started = []

    def start(where: str, seconds: float = 600, place: str = "") -> subprocess.Popen:
        arguments = [sys.executable, "-c", HOLD, where, str(seconds), place]
        started.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def says(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def holds(process: subprocess.Popen) -> subprocess.Popen:
    """The process, once it has the lease."""
    assert says(process) == "ready"
    go(process)
    assert says(process) == "held"
    return process


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def content(where: str) -> dict:
    return json.loads(Storage(where).read(lease.NAME))


def change(where: str, **changes) -> None:
    Storage(where).write(lease.NAME, json.dumps(content(where) | changes).encode())


def test_an_owner_is_named_to_a_second_one_until_it_ends(place):
    assert lease.owner_of(place) is None
    with lease.held(place, "unlearn run a.yaml") as own:
        for _ in range(2):
            with (
                pytest.raises(LeaseError, match=f"{place} is in use by `unlearn run a.yaml`") as told,
                lease.held(place, "second"),
            ):
                pass
        assert f"process {os.getpid()} on {socket.gethostname()}, since 20" in str(
            told.value
        ) and f"kill {os.getpid()}" in str(told.value)
        assert lease.owner_of(place).command == "unlearn run a.yaml" and own.lost == ""
        own.check()
    assert lease.owner_of(place) is None and content(place)["released"] and Storage(place).files() == [lease.NAME]
    with lease.held(place, "unlearn evaluate") as own:
        assert lease.owner_of(place).command == "unlearn evaluate"


def test_a_renewal_that_comes_late_takes_back_no_release(place):
    with lease.held(place, "first") as own:
        own._renew()
        assert content(place)["renewals"] == 1
    own._renew()
    assert lease.owner_of(place) is None


def test_it_is_released_where_the_block_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), lease.held(str(tmp_path), "first"):
        raise KeyboardInterrupt
    assert lease.owner_of(str(tmp_path)) is None


def test_one_of_many_started_at_once_wins(place, holder):
    for _ in range(2):  # where there is no lease yet, and where there is one that was released
        processes = [holder(place) for _ in range(5)]
        assert {says(p) for p in processes} == {"ready"}
        for process in processes:
            go(process)
        told = [says(p) for p in processes]
        assert told.count("held") == 1
        winner = processes[told.index("held")]
        assert all(f"{place} is in use by `run `" in t and f"process {winner.pid} on" in t for t in told if t != "held")
        winner.communicate("\n")
        assert winner.returncode == 0 and lease.owner_of(place) is None


def test_a_killed_owner_is_followed_at_once_on_its_machine(place, holder):
    said = []
    process = holds(holder(place))
    process.kill()  # nobody has waited for it yet: it may be a zombie
    until(lambda: lease.owner_of(place) is None)
    with lease.held(place, "next", say=said.append) as own:
        own.check()
    assert len(said) == 1 and "is taken over from `run `" in said[0] and f"process {process.pid}" in said[0]


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path, holder):
    where = str(tmp_path)
    process = holds(holder(where))
    assert lease.owner_of(where).pid == process.pid
    change(where, birth="1")
    assert lease.owner_of(where) is None
    with lease.held(where, "next"):
        pass


def test_an_owner_elsewhere_that_falls_silent_is_followed_when_its_lease_expires(place, holder):
    process, said = holds(holder(place, seconds=3, place="elsewhere")), []
    process.kill()
    process.wait()
    start = time.monotonic()
    with lease.held(place, "next", say=said.append) as own:
        assert time.monotonic() - start >= 3
        own.check()
    assert "waiting up to 3 s for a sign of life" in said[0] and "is taken over from `run elsewhere`" in said[1]


def test_an_owner_elsewhere_that_renews_keeps_its_lease(s3, holder):
    process, start = holds(holder(s3, seconds=15, place="elsewhere")), time.monotonic()
    for count in range(2):
        with pytest.raises(LeaseError, match="is in use by `run elsewhere`"), lease.held(s3, "second"):
            pass
        assert content(s3)["renewals"] > count
    until(lambda: time.monotonic() - start > 16)
    go(process)
    assert says(process) == "" and process.wait() == 0  # it has checked its lease after more than 15 s


def test_an_owner_elsewhere_that_ends_meanwhile_is_followed(tmp_path, holder):
    process, said = holds(holder(str(tmp_path), place="elsewhere")), []

    def say(text: str) -> None:
        said.append(text)
        process.communicate("\n")

    with lease.held(str(tmp_path), "next", say=say):
        assert len(said) == 1 and "waiting up to 600 s" in said[0]


def test_one_of_many_that_wait_for_a_dead_owner_follows(s3, holder):
    dead = holds(holder(s3, seconds=5, place="dead"))
    dead.kill()
    dead.wait()
    processes = [holder(s3, seconds=30, place=f"node-{i}") for i in range(3)]
    assert {says(p) for p in processes} == {"ready"}
    for process in processes:
        go(process)
    told = [says(p) for p in processes]
    winner = told.index("held")
    assert all(t == "held" or f"is in use by `run node-{winner}`" in t for t in told)
    assert told.count("held") == 1 and content(s3)["place"] == f"node-{winner}"


@pytest.mark.parametrize(
    "age, watched",
    [(20 * 60, True), (2 * 60 * 60, False)],
    ids=["clocks may differ by so much", "older than clocks differ"],
)
def test_an_old_lease_from_elsewhere_is_not_watched(tmp_path, age, watched):
    where, said = str(tmp_path), []
    with lease.held(where, "old"):
        old = lease.owner_of(where)
    stamp = (lease.datetime.now(lease.UTC) - lease.timedelta(seconds=age)).isoformat(timespec="seconds")
    old = dataclasses.replace(old, place="elsewhere", renewed=stamp, seconds=1)
    Storage(where).write(lease.NAME, lease._json(old))
    with lease.held(where, "next", say=said.append):
        assert len(said) == 1 + watched


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b"\xff", b'{"pid": 1}'])
def test_a_damaged_lease_is_watched_and_followed(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    Storage(tmp_path).write(lease.NAME, text)
    said = []
    assert lease.owner_of(str(tmp_path)) is None
    with lease.held(str(tmp_path), "next", seconds=60, say=said.append) as own:
        own.check()
    assert "damaged lease.json" in said[0]


def test_who_has_lost_the_folder_is_told_and_does_not_end_well(place):
    with pytest.raises(LeaseError, match="`thief`.*has taken it over. The same command goes on"):
        with lease.held(place, "first", seconds=10) as own:
            own.check()
            change(place, token="another", command="thief")
            until(lambda: own.lost)
            with pytest.raises(
                LeaseError, match=f"{place} is no longer owned by this process: `thief` .process {os.getpid()} on"
            ):
                own.check()
    assert content(place)["command"] == "thief" and not content(place)["released"]


def test_a_loss_that_nobody_has_asked_about_is_told_at_the_end(place):
    with pytest.raises(LeaseError, match="was deleted while it was written to"), lease.held(place, "first"):
        Storage(place).delete(lease.NAME)
    with lease.held(place, "first"), pytest.raises(ValueError, match="own"), lease.held(f"{place}/b", "second"):
        Storage(place).delete(f"b/{lease.NAME}")
        raise ValueError("own")


def test_who_cannot_renew_is_lost_until_it_can(tmp_path, monkeypatch):
    with lease.held(str(tmp_path), "first", seconds=4) as own:
        now = lease._elapsed
        monkeypatch.setattr(lease, "_elapsed", lambda: now() + 1000)  # as after a sleep of the whole machine
        with pytest.raises(LeaseError, match="could not be renewed for 4 s. The same command goes on"):
            own.check()
        until(lambda: not own.lost)  # it can, and nobody has taken the folder meanwhile


def test_why_it_could_not_be_renewed_is_told(tmp_path):
    with lease.held(str(tmp_path / "run"), "first", seconds=4) as own:
        kept = (tmp_path / "run" / lease.NAME).read_bytes()
        (tmp_path / "run" / lease.NAME).unlink()
        (tmp_path / "run" / lease.NAME).mkdir()
        until(lambda: "directory" in own.lost)
        with pytest.raises(LeaseError, match=r"could not be renewed for 4 s \(.*Is a directory\)"):
            own.check()
        (tmp_path / "run" / lease.NAME).rmdir()
        (tmp_path / "run" / lease.NAME).write_bytes(kept)
        until(lambda: not own.lost)


def test_a_forked_child_does_not_end_the_lease(tmp_path):
    script = f"""
import os, sys
from unlearn import lease
with lease.held({str(tmp_path)!r}, "parent") as own:
    if (child := os.fork()) == 0:
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    assert lease.owner_of({str(tmp_path)!r}).pid == os.getpid()
    own.check()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert content(str(tmp_path))["released"]
