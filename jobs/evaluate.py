"""Evaluate: measure a run over its workers, and write metrics.json and report.html; behind `unlearn evaluate` and
`unlearn report`."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from jobs.pool import pool
from unlearn import documents
from unlearn.data.storage import Storage
from unlearn.errors import UnlearnError
from unlearn.evaluation import comparison, measure, oracles, provenance, report
from unlearn.run import Run
from unlearn.training import metrics

log = logging.getLogger(__name__)

RESULTS = "metrics.json"


def evaluate(
    run: Run, progress: Callable[[int, int], None] = lambda done, total: None, show_forget: bool = False,
    check: Callable[[], None] = lambda: None,
) -> dict:  # fmt: skip
    """Measure every generator on every set under every view; write metrics.json and the report. Returns what is in
    metrics.json.

    The figures do not depend on the number of workers. show_forget: whether the report holds pictures of forget images;
    check: asked with every progress and before anything is written; what it raises ends the measuring. Raises
    UnlearnError.
    """
    began = time.perf_counter()
    trained = provenance.check(run)
    models = comparison.generators(run.settings)
    run = comparison.located(run, models)
    comparison.warn_of_others(run, models)
    log.info(
        "measuring %s on %s",
        ", ".join(models),
        ", ".join(f"{name} ({len(rows)} images)" for name, rows in run.measured.items()),
    )

    def checked(done: int, total: int) -> None:
        check()
        progress(done, total)

    with _workers(run, models) as mapped:
        document, grids = measure.evaluate(run, models, mapped, _pictured(run, show_forget), checked)
    check()
    document["config_hash"] = trained
    return write(run, document, grids, time.perf_counter() - began)


def write(run: Run, document: dict, grids: list[dict], seconds: float) -> dict:
    """Write metrics.json and the report of what measure.evaluate gave, `seconds` after it began. Returns what is in
    metrics.json."""
    document["seconds"]["total"] = round(seconds, 3)
    document["training_seconds"] = training_seconds(run)
    Storage(run.folder).write(RESULTS, json.dumps(document, indent=1, allow_nan=False).encode())
    uri = report.write(run, document, grids)
    log.info("measured in %.0f s: %s", document["seconds"]["total"], uri)
    return document


def write_report(run: Run, show_forget: bool = False) -> str:
    """Write report.html anew from metrics.json and the run's records, pictures made again. Returns its URI. Raises
    UnlearnError."""
    storage = Storage(run.folder)
    if not storage.is_file(RESULTS):
        raise UnlearnError(f"{run.folder} has no {RESULTS}: run `unlearn evaluate` first")
    provenance.check(run)
    document, models = measured(run), comparison.generators(run.settings)
    run = comparison.located(run, models)
    views = [view.name for view in run.settings.evaluation.views]
    if document["views"] != views or not set(oracles.shown(models)) <= set(document["generators"]):
        raise UnlearnError(
            f"{run.folder}/{RESULTS} was measured with other views, weights or oracles than config.yaml says, so "
            "pictures would not be of what was measured: `unlearn evaluate` measures again, and writes the report"
        )
    wanted = measure.columns(list(models), _pictured(run, show_forget))
    with _workers(run, models, looks=False, workers=1) as mapped:
        pictures = dict(zip(wanted, mapped(wanted), strict=True))
    return report.write(run, document, measure.grids(pictures, list(models), _pictured(run, show_forget)))


def measured(run: Run) -> dict[str, Any]:
    """The metrics.json of a run. Raises UnlearnError where it is damaged."""
    found = documents.mapping(Storage(run.folder).read(RESULTS))
    if not all(key in found for key in ("rows", "views", "generators")):
        raise UnlearnError(f"{run.folder}/{RESULTS} is damaged: `unlearn evaluate` measures again")
    return found


def _workers(run: Run, models: dict, looks: bool = True, workers: int | None = None):
    settings = run.settings
    count = workers or settings.evaluation.workers or settings.cluster.workers
    here = settings.training.engine == "torch"
    return pool(measure.Measurer, run, models, looks, cluster=settings.cluster, workers=count, here=here)


def _pictured(run: Run, show_forget: bool) -> list[str]:
    return [name for name in run.measured if name == "retain" or show_forget]


def training_seconds(run: Run) -> float | None:
    """Seconds in training steps, from the logged rates: each row tells of the steps since the one before."""
    rows = metrics.read(run.folder)
    steps = [row["step"] - before["step"] for row, before in zip(rows, [{"step": 0}, *rows], strict=False)]
    times = [n * run.settings.training.batch_size / row["images_per_s"] for n, row in zip(steps, rows, strict=True)]
    return round(sum(times), 1) if rows else None
