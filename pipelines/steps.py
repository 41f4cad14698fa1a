"""What the components do: one step of `jobs.cycle` each, and its figures as artifacts. No kfp is needed here.

A mistake of the user ends a step with one line, not a traceback. Each step owns the cycle's folder while it is at work,
and finds what another has done before, so that a step can be retried and a whole run repeated.
"""

import contextlib
import functools
import html
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

from unlearn import log, signals
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import Selection
from unlearn.errors import ConfigError, CycleError, UnlearnError

HERE = "here"  # train in the step itself
AUDITED = ("no", "yes")  # whether there is an audit step, in words: Kubeflow's backend mishandles False
P = ParamSpec("P")
R = TypeVar("R")
Owned = tuple[Cycle, Selection, Callable[[], None]]


class Selected(NamedTuple):
    Output: str
    id: str


def step(function: Callable[P, R]) -> Callable[P, R]:
    """A function that ends its process with one line where the user can mend what is wrong."""

    @functools.wraps(function)
    def told(*arguments: P.args, **named: P.kwargs) -> R:
        _listen()
        level, form = log.wanted(1)
        log.start(log.JsonLines() if form == "json" else logging.StreamHandler(), level)
        try:
            return function(*arguments, **named)
        except UnlearnError as e:
            say(f"error: {e}")
            sys.exit(2)

    return told


@functools.cache
def _listen() -> None:
    signals.listen()


@step
def select(source: str, rungs: int, audited: str, requests: Any) -> Selected:
    """Take the open requests into a cycle; see `jobs.cycle.select`. requests: an artifact."""
    from jobs import cycle as steps
    from unlearn.cycles import gate_check, keys

    cycle = _cycle(source)
    if cycle.rungs != rungs:
        raise ConfigError(f"{source} has {cycle.rungs} rungs, and this pipeline was made for {rungs}: compile it again")
    if audited != AUDITED[cycle.audit is not None]:
        asked, has = ("no audit", "a step for one") if cycle.audit is None else ("an audit", "no step for one")
        raise ConfigError(f"{source} asks for {asked}, and this pipeline has {has}: compile it again")
    keys.signer(cycle)  # its lack is told before days of training, not after
    with _lease(cycle):
        selection = steps.select(cycle)
    if selection.status == "selected":
        steps.check_rungs(cycle)
        for doubt in gate_check.doubts(cycle):
            say(f"warning: {doubt}")
    counts = {
        "status": selection.status,
        "new": len(selection.new),
        "old": len(selection.old),
        "unmatched": len(selection.unmatched),
        "images": sum(asked.images for asked in (*selection.new, *selection.old)),
        "data": selection.data,
        "base": selection.base,
    }
    _write(requests, json.dumps(counts, indent=1), uri=f"{cycle.cycle_dir}/{selection.id}", **counts)
    say({
        "selected": "{new} new requests, {old} served before, {images} images".format(**counts),
        "nothing": "no open request meets an image: there is nothing to do",
        "due": f"cycle {selection.id} was given up under these settings: retraining is due",
    }[selection.status])  # fmt: skip
    if selection.unmatched:
        say(f"{counts['unmatched']} open requests meet no image, and stay open: `unlearn request list`")
    return Selected(selection.status, selection.id or "none")


@step
def unlearn(
    source: str, id: str, rung: int, to: str, overlay: str, image: str, namespace: str, priority: str, model: Any
) -> None:  # fmt: skip
    """Train a rung here or elsewhere; see `jobs.cycle.train`. model: an artifact."""
    from jobs import cycle as steps
    from pipelines import elsewhere
    from unlearn.data.storage import Storage

    with _step(source, id) as (cycle, selection, check):
        if to != HERE:
            settings = steps.settings(cycle, selection, rung)
            place = elsewhere.place(to, overlay, image, namespace, priority)
            elsewhere.train(place, settings, image, selection.base, check)
        folder = steps.train(cycle, selection, rung, _progress("training"), check)
    card = json.loads(Storage(folder).read("model/model.json"))
    about = {key: card[key] for key in ("family", "sha256", "config_hash", "software")}
    _write(model, json.dumps(about, indent=1), uri=Storage(folder).where("model"), **about)


@step
def evaluate(source: str, id: str, rung: int, metrics: Any, report: Any) -> None:
    """Measure a rung; see `jobs.cycle.evaluate`. metrics, report: artifacts."""
    from jobs import cycle as steps
    from unlearn.data.storage import Storage
    from unlearn.evaluation.report import NAME

    with _step(source, id) as (cycle, selection, check):
        document = steps.evaluate(cycle, selection, rung, _progress("measuring"), check)
        page = Storage(steps.settings(cycle, selection, rung).run_dir).read(NAME)
    for row in document["rows"]:
        if row["view"] == document["views"][0]:
            for figure in ("cosine", "psnr", "fid"):
                if row.get(figure) is not None:
                    metrics.log_metric(f"{row['generator']}.{row['set']}.{figure}", float(row[figure]))
    _write(report, page.decode())


@step
def audit(source: str, id: str, rung: int, figures: Any, page: Any) -> None:
    """Audit a rung; see `jobs.cycle.audit`. figures, page: artifacts."""
    from jobs import cycle as steps
    from unlearn.audit.page import NAME
    from unlearn.data.storage import Storage
    from unlearn.releases.figures import flat

    with _step(source, id) as (cycle, selection, check):
        document = steps.audit(cycle, selection, rung, _progress("auditing"), check)
        if document is None:
            raise CycleError(f"{source} asks for no audit any more: compile the pipeline again")
        made = Storage(steps.settings(cycle, selection, rung).run_dir).read(NAME)
    for name, value in flat({}, document).items():
        if ".unlearned." in name or name.startswith("audit.counts."):
            figures.log_metric(name.removeprefix("audit."), value)
    _write(page, made.decode(), verdict=document["verdict"])
    say(f"audit of rung {rung}: {document['verdict']}")


@step
def judge(source: str, id: str, rung: int, reasons: Any) -> str:
    """Hold a rung against the gate; see `jobs.cycle.judge`. reasons: an artifact. Returns "passed" or "refused"."""
    from jobs import cycle as steps

    with _step(source, id) as (cycle, selection, _):
        judgement = steps.judge(cycle, selection, rung)
    word = "passed" if judgement.passed else "refused"
    checks = judgement.verdict.checks if judgement.verdict else []
    lines = [
        f"- {'kept' if check.passed else 'not judged' if check.passed is None else 'BROKEN'}: {check}"
        for check in checks
    ]
    compared = f", beside release {judgement.parent}" if judgement.parent else ""
    _write(reasons, "\n".join([f"## Rung {rung}: {word}{compared}", "", *(lines or ["There is no gate."])]) + "\n")
    say(f"rung {rung} {word}")
    for line in lines:
        say(line)
    return word


@step
def release(source: str, id: str, rung: int, released: Any) -> str:
    """Publish a rung; see `jobs.cycle.release`. released: an artifact. Returns the version."""
    from jobs import cycle as steps

    with _step(source, id) as (cycle, selection, check):
        outcome = steps.release(cycle, selection, rung, check)
    if outcome is None or outcome.release is None:
        raise CycleError(
            f"cycle {id}: another release has become the parent since rung {rung} was judged, and beside it the gate "
            "refuses: run the pipeline again, it goes on with the next rung"
        )
    about = {"version": outcome.release, "sha256": outcome.weights, "promoted": str(outcome.promoted)}
    _write(released, json.dumps(about, indent=1), uri=f"{cycle.releases}/{outcome.folder}", **about)
    say(f"released {outcome.release}: {len(outcome.numbers)} requests are served")
    return outcome.release


@step
def give_up(source: str, id: str) -> None:
    """End a cycle without a release; see `jobs.cycle.give_up`."""
    from jobs import cycle as steps

    with _step(source, id) as (cycle, selection, _):
        steps.give_up(cycle, selection)
    say("no rung has passed the gate: the requests are open again, and retraining is due")


@step
def close(source: str, figures: Any, page: Any) -> None:
    """Tell from the ledger and the records how things stand. figures, page: artifacts."""
    from pipelines import standing

    now = standing.of(_cycle(source))
    for name, value in now.figures.items():
        figures.log_metric(name, float(value))
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in now.told().items()
    )
    _write(page, f'<!doctype html><meta charset="utf-8"><title>Deletion requests</title><table>{rows}</table>\n')
    for name, value in now.told().items():
        say(f"{name}: {value}")


def _cycle(source: str) -> Cycle:
    from unlearn import patience
    from unlearn.cycles import cycle_file

    cycle = cycle_file.load(source)
    patience.use(cycle.settings(0).storage.patience)
    return cycle


@contextlib.contextmanager
def _lease(cycle: Cycle) -> Iterator[Callable[[], None]]:
    from jobs import cycle as steps

    with steps.owned(cycle, "pipeline") as check:
        yield check


@contextlib.contextmanager
def _step(source: str, id: str) -> Iterator[Owned]:
    from jobs import cycle as steps

    cycle = _cycle(source)
    with _lease(cycle) as check:
        yield cycle, steps.opened(cycle, id), check


def _write(artifact: Any, text: str, **metadata: Any) -> None:
    with open(artifact.path, "w", encoding="utf-8") as f:
        f.write(text)
    artifact.metadata.update(metadata)


def say(text: str) -> None:
    """A line in the step's log."""
    print(log.visible(text), flush=True)


def _progress(what: str, every: float = 30) -> Callable[..., None]:
    """What a step of `jobs.cycle` is given, either (row of training) or (done, total): a line at most every `every`
    seconds."""
    last = time.monotonic()

    def told(*about: Any) -> None:
        nonlocal last
        done, total = (about[0].get("step"), about[0].get("steps")) if len(about) == 1 else about
        if done is not None and (done == total or time.monotonic() - last >= every):
            last = time.monotonic()
            say(f"{what} {done}/{total}")

    return told
