"""Audit: a run's tests over its workers, and audit.json and audit.html of them; behind `unlearn audit`."""

import contextlib
import io
import json
import logging
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from jobs import evaluate
from jobs.pool import Map, pool
from unlearn import __version__, documents
from unlearn.audit import base, page, shadows
from unlearn.audit.base import Measured, Piece, test_class
from unlearn.audit.bench import Benches
from unlearn.audit.settings import USUAL, AuditConfig
from unlearn.audit.subject import Subject, subject
from unlearn.config import RunConfig
from unlearn.data import selection
from unlearn.data.storage import Storage
from unlearn.errors import UnlearnError
from unlearn.evaluation import comparison, provenance
from unlearn.run import Run

log = logging.getLogger(__name__)

RESULTS = "audit.json"
DONE = "audit"  # folder of what is measured already, a file a piece
Progress = Callable[[int, int], None]


def audit(
    run: Run, settings: AuditConfig, progress: Progress = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
    again: bool = False, kept: str | None = None, shared: Callable[[], Map] | None = None, unless_made: bool = False,
) -> dict:  # fmt: skip
    """Make every test of `settings` on a trained run; write audit.json and the page. Returns what is in audit.json.

    What an audit of the same weights, images and options has measured before is not measured again, unless `again`. The
    figures do not depend on the number of workers. check: asked with every progress and before anything is written.
    kept: folder of what was measured, by default the run's `audit`; runs of one original may share it. shared: gives
    `workers` that serve other audits too; else it has its own. unless_made: whether an audit.json that this audit would
    write again is taken as it is. Raises UnlearnError.
    """
    began = time.perf_counter()
    trained = provenance.check(run)
    audited = prepared(run, settings)
    run, identity = audited.run, audited.identity()
    if unless_made and (document := _made(run, identity)):
        return document
    seconds: dict[str, float] = {}
    judged = {}
    for test in audited.tests.values():
        if reason := test.missing(audited):
            judged[test.name] = base.document(
                test, [], [base.Judgement(base.NOT_SHOWN, reason, open=True)], settings.confidence
            )
    folder = Storage(kept or Storage(run.folder).where(DONE))
    left = [name for name in audited.tests if name not in judged]
    measured = _measured(audited, left, folder, progress, check, again, seconds, shared)
    computing = time.perf_counter()
    for name, found in measured.items():
        figures = audited.tests[name].figures(found, audited)
        judgements = [j for j in (base.judge(figure, settings.confidence) for figure in figures) if j]
        judged[name] = base.document(audited.tests[name], figures, judgements, settings.confidence)
    seconds["figures"] = time.perf_counter() - computing
    check()
    document = {
        "software": f"unlearn {__version__}", "name": run.settings.name, "config_hash": trained, "identity": identity,
        "weights": {name: audited.source(name).fingerprint for name in audited.models},
        "sets": selection.describe(audited.sets),
        "settings": {
            name: value for name, value in settings.model_dump(mode="json").items()
            if name not in audited.tests and not isinstance(value, dict)
        },
    }  # fmt: skip
    document |= _verdict(judged, list(audited.tests), comparison.others(run, audited.models))
    document |= {name: judged[name] for name in audited.tests}
    seconds["total"] = time.perf_counter() - began
    document["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    written = page.write(run, document)  # first: an audit.json that is there ends the audit, see `unless_made`
    Storage(run.folder).write(RESULTS, json.dumps(document, indent=1, allow_nan=False).encode())
    log.info("audited in %.0f s: %s, %s", seconds["total"], document["verdict"], written)
    return document


def workers(settings: RunConfig, audit: AuditConfig) -> AbstractContextManager[Map]:
    """Workers for the audits of runs such as this one, one audit after another."""
    count = audit.workers or settings.evaluation.workers or settings.cluster.workers
    return pool(Benches, cluster=settings.cluster, workers=count, here=settings.training.engine == "torch")


def report(run: Run, document: dict, show_forget: bool = False) -> str | None:
    """Write report.html anew, with the audit in it; its URI. None where the run has no figures of these weights to
    report, or none that a report can be written of, which is told."""
    if not Storage(run.folder).is_file(evaluate.RESULTS):
        return None
    try:
        measured = evaluate.measured(run)
        if measured.get("weights", {}).get(base.UNLEARNED) != document["weights"][base.UNLEARNED]:
            return None
        return evaluate.write_report(run, show_forget)
    except UnlearnError as e:
        log.warning("report.html stays as it was, without this audit: %s", e)
        return None


def prepared(run: Run, settings: AuditConfig) -> Subject:
    """What an audit of this run looks at, all of it looked up. Raises UnlearnError."""
    models = comparison.generators(run.settings)
    if base.UNLEARNED not in models:
        raise UnlearnError(f"{run.folder}: no trained model there, so there is nothing to audit: `unlearn run` first")
    return subject(run, models, settings)


def train_shadows(
    run: Run, recipe: Run, folder: str, count: int, workers: int | None = None,
    progress: Progress = lambda done, total: None, check: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """Train `count` shadow models of a run's original into a folder, those that are not there yet; their URIs.

    recipe: the run that trains the original. Each is one plain process, several at a time on a cluster; one that was
    stopped goes on from its checkpoint. Raises UnlearnError.
    """
    if "forget" not in run.sets:
        raise UnlearnError("data.forget is missing: shadow models are trained without half of it each")
    shadows.card(folder, recipe, run.sets["forget"])
    cluster = run.settings.cluster
    made = []
    count_workers = min(workers or cluster.workers, count)
    with pool(
        shadows.Trainer, recipe, folder, run.sets["forget"], cluster=cluster, workers=count_workers, here=True
    ) as mapped:
        for uri in mapped(range(count)):
            check()
            made.append(uri)
            progress(len(made), count)
    return made


def _verdict(judged: dict[str, dict], names: list[str], doubts: list[str]) -> dict:
    """The verdict of the whole, and each test's in a sentence. doubts: of the oracles, with which nothing passes."""
    verdicts = {name: judged[name]["verdict"] for name in names}
    verdict = base.combined([base.Judgement(verdicts[n], "", judged[n]["open"], judged[n]["trace"]) for n in names])
    traces = any(judged[n]["trace"] for n in names)  # whether a test asked for what was forgotten
    if verdict == base.PASS and (doubts or not traces):
        verdict = base.NOT_SHOWN
    reasons = [f"{judged[n]['title']}: {verdicts[n]}" for n in names]
    if left_out := [test_class(name).title for name in USUAL if name not in names]:
        reasons.append(f"Not made: {', '.join(left_out)}")
    reasons += doubts
    counts = {
        key: sum(v == told for v in verdicts.values())
        for key, told in (("passed", base.PASS), ("failed", base.FAIL), ("not_shown", base.NOT_SHOWN))
    }
    return {"verdict": verdict, "counts": counts, "reasons": reasons, "tests": names}


def _measured(
    audited: Subject, names: list[str], storage: Storage, progress: Progress, check: Callable[[], None], again: bool,
    seconds: dict[str, float], shared: Callable[[], Map] | None,
) -> dict[str, Measured]:  # fmt: skip
    """What all pieces of these tests have found, by test; seconds of workers are added up by test.

    storage: of what was measured."""
    pieces = [piece for name in names for piece in audited.tests[name].pieces(audited)]
    # Generator by generator over all tests, so that a worker loads each few times.
    order = {name: i for i, name in enumerate(audited.every)}
    pieces.sort(key=lambda piece: order[piece.generator])
    keys = {piece: audited.key(piece) for piece in pieces}
    there = set() if again else set(storage.files())
    left = [piece for piece in pieces if _file(keys[piece]) not in there]
    found: dict[Piece, dict[str, np.ndarray]] = {}
    if left:
        own = contextlib.nullcontext(shared()) if shared else workers(audited.run.settings, audited.settings)
        with own as mapped:
            results = mapped(left, audited)
            for done, (piece, arrays) in enumerate(zip(left, results, strict=True), len(pieces) - len(left) + 1):
                check()
                storage.write(_file(keys[piece]), _packed(arrays))
                found[piece] = arrays
                progress(done, len(pieces))
    for piece in pieces:
        if piece not in found:
            found[piece] = _unpacked(storage.read(_file(keys[piece])), storage.where(_file(keys[piece])))
        seconds[piece.test] = seconds.get(piece.test, 0.0) + float(found[piece]["seconds"].sum())
    return {name: _joined(found, name) for name in names}


def _made(run: Run, identity: str) -> dict[str, Any] | None:
    """The audit.json of a run, where it is of this audit."""
    storage = Storage(run.folder)
    document = documents.mapping(storage.read(RESULTS)) if storage.is_file(RESULTS) else {}
    return document if document.get("identity") == identity else None


def _joined(found: dict[Piece, dict[str, np.ndarray]], name: str) -> Measured:
    """The arrays of a test, those of one (generator, what) put together in the order of their rows."""
    parts: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
    for piece in sorted((p for p in found if p.test == name), key=lambda p: p.start):
        parts.setdefault((piece.generator, piece.what), []).append(found[piece])
    return {
        key: {column: np.concatenate([one[column] for one in rows]) for column in rows[0]}
        for key, rows in parts.items()
    }


def _file(key: str) -> str:
    return f"{key[:32]}.npz"


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _unpacked(data: bytes, where: str) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UnlearnError(f"{where} is damaged ({type(e).__name__}): delete it, and audit again") from None
