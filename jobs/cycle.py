"""Cycle: serve the deletion requests that have accumulated, from the base model, and release what came of it; behind
`unlearn cycle`.

    selection = select(cycle)                    # which requests, as a cycle with an id
    for rung in range(cycle.rungs):
        train(cycle, selection, rung)
        evaluate(cycle, selection, rung)
        audit(cycle, selection, rung)            # where the cycle says how
        if judge(cycle, selection, rung).passed:
            return release(cycle, selection, rung)
    return give_up(cycle, selection)             # retraining is due

Each step can be repeated, and killed anywhere: it finds what was done in the cycle's folder and does not do it again.
The state of a request follows what is there, never the other way round. A caller owns the cycle meanwhile (`owned`) and
hands what that gives to the steps.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from jobs import owner
from unlearn import config, documents
from unlearn.config import RunConfig
from unlearn.cycles import keys, lineage, rows, selecting
from unlearn.cycles.cycle import Cycle, digest
from unlearn.cycles.records import (
    AUDITED,
    MEASURED,
    OUTCOME,
    VERDICTS,
    Judgement,
    Measured,
    Outcome,
    Records,
    Selection,
    now,
)
from unlearn.data.storage import Storage
from unlearn.errors import CycleError
from unlearn.ledger import states
from unlearn.ledger.ledger import Ledger
from unlearn.releases import pointer
from unlearn.releases import publish as releases
from unlearn.releases.store import Store

Check = Callable[[], None]
Training = Callable[[dict], None]
Measuring = Callable[[int, int], None]


def nothing(*about: Any) -> None: ...


@contextlib.contextmanager
def owned(cycle: Cycle, command: str) -> Iterator[Check]:
    """Own cycle_dir and the store of releases, of which one cycle at a time makes the next release; what the steps are
    handed as `check`. Raises LeaseError where another process owns either."""
    Storage(cycle.releases).check_writable()
    with contextlib.ExitStack() as stack:
        places = dict.fromkeys((cycle.cycle_dir, cycle.releases))
        leases = [stack.enter_context(owner.owned(place, command, advice="")) for place in places]

        def check() -> None:
            for lease in leases:
                lease.check()

        yield check


def select(cycle: Cycle) -> Selection:
    """Take the open requests that meet images into a cycle, or find the cycle that was begun and has not ended.

    They become `scheduled`. What meets no image stays `received` and is named in `unmatched`. Costs seconds where
    nothing is open. Raises UnlearnError: no ledger, no data; CycleError where a request that was served before cannot
    be forgotten again.
    """
    with Ledger(cycle.ledger) as ledger:
        selection = selecting.select(cycle, ledger)
    if selection.status == "selected":
        lineage.write(cycle, Records(cycle.cycle_dir), selection)
    return selection


def opened(cycle: Cycle, id: str) -> Selection:
    """The selection of a cycle that was begun, for a step that is called alone. Raises CycleError where there is
    none."""
    return Records(cycle.cycle_dir).selection(id)


def settings(cycle: Cycle, selection: Selection, rung: int) -> RunConfig:
    """The configuration of a rung, as `unlearn run` would take it: its run_dir is the run folder in the cycle's own,
    its data.forget what all requests of the selection name. It may name ids and subjects: keep it out of logs and of
    parameters."""
    folder = Records(cycle.cycle_dir).run_folder(selection.id, cycle.run_key(rung))
    storage = Storage(folder)
    if storage.is_file("config.yaml"):  # what was resolved once stays
        forget = config.read(storage.read("config.yaml").decode(), storage.where("config.yaml")).data.forget
    else:
        manifest = selecting.data(cycle)
        if manifest.hash != selection.data:
            raise CycleError(f"cycle {selection.id}: the data was changed since it began: start the cycle again")
        with Ledger(cycle.ledger) as ledger:
            forget = selecting.named(ledger, [*selection.new, *selection.old], manifest)
    made = cycle.settings(rung, forget, folder)
    return made.model_copy(update={"name": f"{cycle.name}-{selection.id}-{rung}"})


def train(
    cycle: Cycle, selection: Selection, rung: int, progress: Training = nothing, check: Check = nothing
) -> str:  # fmt: skip
    """Train a rung and export it, or go on from its newest checkpoint; the run folder. The requests become
    `trained`."""
    run = settings(cycle, selection, rung)
    if not Storage(run.run_dir).is_file("model/model.json"):
        from jobs import train as training

        prepared = training.prepare(run, resume=True)
        if prepared.origin["weights"] != selection.base:
            raise CycleError(f"cycle {selection.id}: the base was changed since it began: start the cycle again")
        training.train(prepared, progress, check)
    check()
    with Ledger(cycle.ledger) as ledger:
        selecting.advance(ledger, selection, states.TRAINED)
    return run.run_dir


def evaluate(
    cycle: Cycle, selection: Selection, rung: int, progress: Measuring = nothing, check: Check = nothing
) -> dict[str, Any]:  # fmt: skip
    """Measure a rung; what is in metrics.json. Besides `forget` and `retain` there are the sets `forget_new` and, from
    the second cycle on, `forget_old`: what is asked now, and what was served before."""
    run, records = settings(cycle, selection, rung), Records(cycle.cycle_dir)
    measured = run.evaluation.model_dump(mode="json", exclude={"workers", "batch_size"})
    name = f"{MEASURED}/{cycle.run_key(rung)}-{digest(measured)}.json"
    if done := _done(records, selection.id, name, Storage(run.run_dir), "metrics.json"):
        return done
    from jobs import evaluate as evaluation
    from unlearn.cycles.measured import with_parts
    from unlearn.run import resolve

    resolved = resolve(run, measured=True)
    manifest, asked = resolved.sets["forget"].manifest, [*selection.new, *selection.old]
    with Ledger(cycle.ledger) as ledger:
        new, old = (selecting.named(ledger, part, manifest) for part in (selection.new, selection.old))
        requests = ledger.requests(ids=[each.number for each in asked])
    document = evaluation.evaluate(with_parts(resolved, new, old, requests), progress, check=check)
    records.keep(selection.id, name, Measured(sha256=_sha256(Storage(run.run_dir), "metrics.json") or ""))
    return document


def audit(
    cycle: Cycle, selection: Selection, rung: int, progress: Measuring = nothing, check: Check = nothing
) -> dict[str, Any] | None:  # fmt: skip
    """Audit a rung as cycle.audit says; what is in audit.json, which the gate can judge. None where it says nothing."""
    if cycle.audit is None:
        return None
    run, records = settings(cycle, selection, rung), Records(cycle.cycle_dir)
    name = f"{AUDITED}/{cycle.run_key(rung)}-{digest(cycle.audit)}.json"
    if done := _done(records, selection.id, name, Storage(run.run_dir), "audit.json"):
        return done
    from jobs import audit as audits
    from unlearn.audit.settings import parse
    from unlearn.run import resolve

    document = audits.audit(
        resolve(run, measured=True), parse(cycle.audit, f"cycle {cycle.name}: audit"), progress, check
    )
    records.keep(selection.id, name, Measured(sha256=_sha256(Storage(run.run_dir), "audit.json") or ""))
    return document


def judge(cycle: Cycle, selection: Selection, rung: int) -> Judgement:
    """Hold the figures of a rung against the gate. Where it passes the requests become `verified`."""
    records, key = Records(cycle.cycle_dir), cycle.run_key(rung)
    folder = Storage(records.run_folder(selection.id, key))
    parent = selecting.parent(cycle, records, selection.id)
    evidence = {name: _sha256(folder, f"{name}.json") for name in ("metrics", "audit")}
    name = f"{VERDICTS}/{digest(evidence | {'run': key, 'gate': cycle.gate, 'parent': parent})}.json"
    with Ledger(cycle.ledger) as ledger:
        judgement = records.read(selection.id, name, Judgement)
        if judgement is None:
            verdict, weights = releases.judge(folder.uri, Store(cycle.releases), cycle.rules, parent)
            gone = {
                r.id for r in ledger.requests(ids=selection.numbers) if not r.is_open and r.state != states.RELEASED
            }
            served = [a for a in (*selection.new, *selection.old, *selection.unseen) if a.number not in gone]
            judgement = records.keep(selection.id, name, Judgement(
                rung=rung, run=key, verdict=verdict, parent=parent, metrics=evidence["metrics"] or "", weights=weights,
                requests=sorted(asked.commitment for asked in served), at=now(),
            ))  # fmt: skip
        lineage.write(cycle, records, selection)
        if judgement.passed:
            facts = {"gate": "passed" if judgement.verdict else "none", "metrics": judgement.metrics}
            selecting.advance(ledger, selection, states.VERIFIED, facts)
    return judgement


def release(cycle: Cycle, selection: Selection, rung: int, check: Check = nothing) -> Outcome | None:
    """Publish a rung that has passed, make it current, and mark the requests `released`; None where the gate refuses it
    after all, since another release is the parent by now. Rewrites the shards before, where cycle.delete_rows says
    so."""
    records = Records(cycle.cycle_dir)
    ended = records.read(selection.id, OUTCOME, Outcome)
    if ended is None:
        judgement = judge(cycle, selection, rung)
        if not judgement.passed:
            return None
        run, store = records.run_folder(selection.id, judgement.run), Store(cycle.releases)
        rewritten = rows.write(cycle, records, selection.id, settings(cycle, selection, rung), check)
        published = releases.publish(
            run, store, keys.signer(cycle), judgement.requests, cycle.rules, judgement.parent, check=check,
            rewritten=rewritten and (rewritten.before, rewritten.after), model_key=cycle.model_key,
        )  # fmt: skip
        if published.release is None:
            return None
        if cycle.promote:
            pointer.promote(store, published.release.version, f"cycle {selection.id}", by=selecting.BY)
        ended = records.keep(selection.id, OUTCOME, Outcome(
            id=selection.id, at=now(), release=published.release.version, folder=published.folder,
            weights=published.release.weights,
            rung=rung, run=judgement.run, promoted=cycle.promote, numbers=selection.numbers, rows=rewritten,
        ))  # fmt: skip
    lineage.write(cycle, records, selection)
    with Ledger(cycle.ledger) as ledger:
        facts = {"release": ended.release, "weights": ended.weights, "current": ended.promoted}
        selecting.advance(ledger, selection, states.RELEASED, facts)
    return ended


def give_up(cycle: Cycle, selection: Selection) -> Outcome:
    """No rung has passed: the requests become `received` again, and retraining is due (`Outcome.due`)."""
    records = Records(cycle.cycle_dir)
    name = selecting.given_up(cycle, records, selection.id)
    ended = records.keep(
        selection.id, name, Outcome(id=selection.id, at=now(), release=None, numbers=selection.numbers)
    )
    lineage.write(cycle, records, selection)
    with Ledger(cycle.ledger) as ledger:
        selecting.hand_back(ledger, selection.id, "retraining is due")
    return ended


@dataclass(frozen=True)
class Ended:
    """How a cycle went. outcome: None where there was nothing to serve. judgements: of the rungs that were tried.
    seconds: by step."""

    selection: Selection
    outcome: Outcome | None
    judgements: list[Judgement]
    seconds: dict[str, float]


# Called with a step and its rung; in the block it gives, what it gives is called with the step's progress.
Shown = Callable[[str, int], AbstractContextManager[Callable[..., None]]]


def run(
    cycle: Cycle, shown: Shown = lambda step, rung: contextlib.nullcontext(nothing), check: Check = nothing
) -> Ended:  # fmt: skip
    """A whole cycle, or on from where it was stopped. Raises UnlearnError."""
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(name: str, rung: int = 0) -> Iterator[Callable[..., None]]:
        check()
        began = time.perf_counter()
        with shown(name, rung) as progress:
            yield progress
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

    keys.signer(cycle)  # its lack is told before anything is trained
    for place in filter(None, (cycle.releases, cycle.delete_rows)):
        Storage(place).check_writable()
    with step("select"):
        selection = select(cycle)
    if selection.status == "nothing":
        return Ended(selection, None, [], seconds)
    if selection.status == "due":
        records = Records(cycle.cycle_dir)
        ended = records.read(selection.id, selecting.given_up(cycle, records, selection.id), Outcome)
        return Ended(selection, ended, [], seconds)
    check_rungs(cycle)
    judgements = []
    for rung in range(cycle.rungs):
        with step("train", rung) as progress:
            train(cycle, selection, rung, progress, check)
        with step("evaluate", rung) as progress:
            evaluate(cycle, selection, rung, progress, check)
        if cycle.audit is not None:
            with step("audit", rung) as progress:
                audit(cycle, selection, rung, progress, check)
        with step("judge", rung):
            judgements.append(judge(cycle, selection, rung))
        if judgements[-1].passed:
            with step("release", rung):
                outcome = release(cycle, selection, rung, check)
            if outcome is not None:
                return Ended(selection, outcome, judgements, seconds)
    with step("release"):
        return Ended(selection, give_up(cycle, selection), judgements, seconds)


def check_rungs(cycle: Cycle) -> None:
    """Raises ConfigError where a method of the ladder cannot work with the model or the training, or the audit is
    none."""
    from jobs import train as training
    from unlearn.audit.settings import parse

    parse(cycle.audit or {}, f"cycle {cycle.name}: audit")

    for rung in range(cycle.rungs):
        training.check_method(cycle.settings(rung, config.Rows()))


def _done(records: Records, id: str, name: str, folder: Storage, file: str) -> dict[str, Any] | None:
    """What is in a file of figures, if it is the one that this cycle has measured."""
    known, there = records.read(id, name, Measured), folder.read_version(file)
    same = known and there and hashlib.sha256(there[0]).hexdigest() == known.sha256
    return documents.from_json(there[0]) if there and same else None


def _sha256(folder: Storage, name: str) -> str | None:
    found = folder.read_version(name)
    return hashlib.sha256(found[0]).hexdigest() if found else None
