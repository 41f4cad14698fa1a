"""A cycle that is killed anywhere and started again ends the same, once.

UNLEARN_KILLS=100 python -m pytest -m slow -s tests/cycles/test_cycle_kills.py      100 kills at random points
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.cycles import ask, standing, tiny_cycle

from jobs import audit, evaluate, train
from jobs import cycle as job
from unlearn import certificate
from unlearn.cycles import selecting
from unlearn.cycles.records import OUTCOME, Outcome, Records
from unlearn.ledger import verification as ledgers
from unlearn.ledger.ledger import Ledger
from unlearn.releases import pointer, publish, verification
from unlearn.releases.store import Store

KILLS = int(os.environ.get("UNLEARN_KILLS", "20"))
# What changes something that outlives the process, in the order of a cycle.
EFFECTS = (
    (Records, "keep"), (selecting, "advance"), (train, "train"), (evaluate, "evaluate"), (audit, "audit"),
    (publish, "publish"), (pointer, "promote"),
)  # fmt: skip
AUDIT = {"tests": ["transfer"], "limit": 2, "resamples": 100}


def test_killed_at_every_boundary_it_ends_the_same_once(tmp_path, tiny_shards, tiny_model, monkeypatch):
    """All that there is on disk is kept aside at each boundary, as a process that was killed there would leave it."""
    folder, aside = tmp_path / "work", tmp_path / "aside"
    folder.mkdir()
    cycle = tiny_cycle(folder, tiny_shards, tiny_model, audit=AUDIT)
    ask(cycle, {"subjects": ["person-1"]})
    names: list[str] = []

    def boundary(name: str) -> None:
        shutil.copytree(folder, aside / str(len(names)))
        names.append(name)

    with monkeypatch.context() as patch:
        for owner, name in EFFECTS:
            patch.setattr(owner, name, _watched(getattr(owner, name), name, boundary))
        whole = job.run(cycle)
    steps = [name.split()[1] for name in names if name.startswith("before")]
    assert steps == [
        "keep", "advance", "train", "advance", "evaluate", "keep", "audit", "keep", "keep", "advance", "advance",
        "publish", "promote", "keep", "advance",
    ]  # fmt: skip
    trained = names.index("after train")
    measured, audited = (names.index(f"after {step}") + 2 for step in ("evaluate", "audit"))
    for number, name in enumerate(names):
        shutil.rmtree(folder)
        shutil.copytree(aside / str(number), folder)
        with monkeypatch.context() as patch:
            if number >= trained:
                patch.setattr(train, "train", None)
            if number >= measured:
                patch.setattr(evaluate, "evaluate", None)
            if number >= audited:
                patch.setattr(audit, "audit", None)
            ended = job.run(cycle)
        where = f"killed {number}, {name}"
        if number == len(names) - 1:
            assert ended.selection.status == "nothing", where
        else:
            assert ended.selection.id == whole.selection.id and ended.outcome.weights == whole.outcome.weights, where
        assert standing(cycle) == {1: "released"}, where
        store = Store(cycle.releases)
        assert [release.version for release in store.releases()] == ["v1"], where
        assert [move.after for move in pointer.read(store).history] == ["v1"], where
        kept = Records(cycle.cycle_dir).read(whole.selection.id, OUTCOME, Outcome)
        assert kept and kept.release == "v1" and len(list(Path(cycle.cycle_dir).glob("*/selection.json"))) == 1, where
        with Ledger(cycle.ledger) as ledger:
            events = [step["event"] for step in ledger.history(1)]
        assert events == ["received", "scheduled", "trained", "verified", "released"], where


def _watched(function, name: str, boundary):
    def watched(*arguments, **named):
        boundary(f"before {name}")
        result = function(*arguments, **named)
        boundary(f"after {name}")
        return result

    return watched


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_again_and_again_all_is_consistent(tmp_path, tiny_shards, tiny_model):
    """Requests come in while cycles are killed; after each kill ledger, releases and pointer are held against each
    other."""
    cycle = tiny_cycle(tmp_path, tiny_shards, tiny_model, audit=AUDIT)
    draw, kills, asked = random.Random(0), 0, 0
    public, seal = (
        certificate.public_key(str(tmp_path / "releases.pub")),
        certificate.private_key(str(tmp_path / "releases.key")),
    )
    store, checkpoints = Store(cycle.releases), str(tmp_path / "checkpoints")
    ask(cycle, {"ids": ["img-047"]})
    whole = sum(job.run(cycle).seconds.values())  # on this machine, today
    while kills < KILLS:
        if all(state == "released" for state in standing(cycle).values()):
            ask(cycle, {"ids": [f"img-{asked:03d}"]})
            asked = (asked + 1) % 47
        if (process := os.fork()) == 0:
            _serve(cycle)
        time.sleep(draw.uniform(0.0, whole))
        os.kill(process, signal.SIGKILL)
        ended = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(ended) or os.waitstatus_to_exitcode(ended) == 0, "it met what is no kill"
        kills += os.WIFSIGNALED(ended)
        _check(cycle, store, checkpoints, public, seal)
    job.run(cycle)
    assert set(standing(cycle).values()) == {"released"}
    print(
        f"{kills} kills of a cycle of {whole:.1f} s, {len(store.releases())} releases, {len(standing(cycle))} requests"
    )
    for release in store.releases():
        verification.verify(store.folder(release).uri, public)


def _serve(cycle) -> None:
    try:
        job.run(cycle)
    except BaseException as e:
        print(type(e).__name__, e)
        os._exit(3)
    os._exit(0)


def _check(cycle, store: Store, checkpoints: str, public, seal) -> None:
    with Ledger(cycle.ledger) as ledger:
        ledgers.checkpoint(ledger, checkpoints, seal)
        ledgers.verify(ledger, checkpoints, public).check(ledger.name)
        requests = ledger.requests()
    known = {release.version: release for release in store.releases()}
    assert list(known) == [f"v{number}" for number in range(1, len(known) + 1)]
    state = pointer.read(store)
    assert state.version is None or state.version == list(known)[-1] or list(known)[-1] == f"v{len(known)}"
    assert [move.after for move in state.history] == list(known)[: len(state.history)], (
        "each is promoted once, in order"
    )
    for request in requests:
        serving = [version for version, release in known.items() if request.commitment in release.requests]
        if request.state == "released":
            assert request.evidence["release"] == serving[0] and state.history
            assert request.commitment in known[state.version].requests, (
                "the current model has forgotten what is said to be"
            )
        else:
            assert len(serving) <= 1, "at most the release that was being published"
