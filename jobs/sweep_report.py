"""The report of a sweep: measures the points of its front once more, on held-out images, and writes its page; behind
`unlearn sweep report`.

Models that are measured on the same images, with the same seed, are measured in one go: the images are read, and the
original and the oracle measured, once for all of them.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from jobs.pool import Map, pool
from unlearn import config
from unlearn.data.storage import Storage
from unlearn.errors import UnlearnError
from unlearn.evaluation import comparison, measure
from unlearn.models import weights
from unlearn.run import Run, resolve
from unlearn.search import alone, front, page
from unlearn.search.objectives import Figures, derived, of_document
from unlearn.search.records import Point, Trial, Trials, points
from unlearn.search.space import Sweep

log = logging.getLogger(__name__)


@dataclass
class Group:
    """Trials that are looked at on the same images with the same seed, after the same original. run: of one of them."""

    run: Run
    judged: list[Trial]
    others: list[Trial]


def report(
    sweep: Sweep, show_forget: bool = False, progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[], None] = lambda: None, again: bool = False, whole: bool = False,
) -> str:  # fmt: skip
    """Measure the front, or all points (`whole`), on held-out images, make the pictures of every point, and write
    report.html and report.json; the page's URI.

    A trial that was measured before is not measured again unless `again`. show_forget: whether the page holds pictures
    of forget images; check: asked with every progress; what it raises ends the report. Raises UnlearnError.
    """
    page.check()  # before anything is measured
    known = Trials(Storage(sweep.sweep_dir))
    trials = {trial.id: trial for trial in known.all()}
    every = points(trials.values(), sweep.bounds)
    if not any(trial.status == "done" for trial in trials.values()):
        raise UnlearnError(f"{sweep.sweep_dir}: no trial is done yet, so there is nothing to report")
    if whole and not page.held_out_named(sweep):
        log.warning("--all: the run names no held-out images (evaluation.data), so nothing is measured on them")
    chosen = every if whole else front.of_points(every, sweep.wanted)
    judged = {point.id for point in chosen} if page.held_out_named(sweep) else set()
    grids: page.Grids = {}
    groups = list(_groups(sweep, every, judged, again))
    for number, group in enumerate(groups):

        def told(done: int, total: int, number: int = number) -> None:
            check()
            progress(number * total + done, len(groups) * total)

        measured, pictured = _looked_at(sweep, group, show_forget, told)
        for id, figures in measured.items():
            trials[id] = replace(trials[id], held_out=figures)
            known.write(trials[id])
        for id, shown in pictured.items():
            grids.setdefault(trials[id].point, shown)
    check()
    return page.write(sweep, list(trials.values()), grids)


def _groups(sweep: Sweep, every: list[Point], judged: set[str], again: bool) -> Iterator[Group]:
    """What there is to do: trials of the points `judged` that are to be measured, and of each other point one that is
    to be pictured."""
    made: dict[tuple, Group] = {}
    for point in every:
        done = [trial for trial in point.trials if trial.status == "done"]
        measured = [trial for trial in done if again or trial.held_out is None] if point.id in judged else []
        pictured = [trial for trial in done[:1] if trial not in measured]
        for trial in [*measured, *pictured]:
            settings = alone.settings(sweep, trial)
            if not Storage(settings.run_dir).is_file(f"model/{weights.CARD}"):
                log.warning("%s: no model in %s: neither measured nor pictured", trial.id, settings.run_dir)
                continue
            known = next((group.run.sources for group in made.values()), None)
            run = resolve(settings, measured=True, known=known)
            rows = tuple((name, rows.manifest.hash, rows.rows.tobytes()) for name, rows in sorted(run.measured.items()))
            key = (trial.seed, settings.model.model_dump_json(), settings.evaluation.model_dump_json(), rows)
            group = made.setdefault(key, Group(run, [], []))
            (group.judged if trial in measured else group.others).append(trial)
    yield from made.values()


def _looked_at(
    sweep: Sweep, group: Group, show_forget: bool, progress: Callable[[int, int], None]
) -> tuple[dict[str, Figures], dict[str, list[dict]]]:
    """({trial of the front: its figures on held-out images}, {trial: its picture grids})."""
    settings = group.run.settings
    pictured = [name for name in group.run.measured if name == "retain" or show_forget]
    beside = {name: model for name, model in comparison.generators(settings).items() if name != "unlearned"}
    measured, shown = {}, {}
    if group.judged:
        models = beside | _models(sweep, settings, group.judged)
        with _workers(group.run, models, looks=True) as (run, mapped):
            document, grids = measure.evaluate(run, models, mapped, pictured, progress)
        original, oracle = of_document(document, "original"), of_document(document, "oracle")
        for trial in group.judged:
            measured[trial.id] = derived(of_document(document, trial.id), original, oracle)
            shown[trial.id] = _grids_of(trial, grids, beside)
    if group.others:
        models = beside | _models(sweep, settings, group.others)
        wanted = measure.columns(list(models), pictured)
        with _workers(group.run, models, looks=False) as (_, mapped):
            pictures = dict(zip(wanted, mapped(wanted), strict=True))
        grids = measure.grids(pictures, list(models), pictured)
        shown |= {trial.id: _grids_of(trial, grids, beside) for trial in group.others}
    return measured, shown


def _models(sweep: Sweep, settings: config.RunConfig, trials: Iterable[Trial]) -> dict[str, config.Model]:
    folder = Storage(sweep.sweep_dir)
    return {t.id: settings.model.model_copy(update={"weights": folder.where(f"{t.run}/model")}) for t in trials}


def _grids_of(trial: Trial, grids: list[dict], beside: Iterable[str]) -> list[dict]:
    """Of grids with a column for every trial, what belongs to one: the images, what is seen of them, the models beside
    it, its own."""
    own = f"{trial.id} model"
    kept = {"the image", "what the model sees", *(f"{name} model" for name in beside), own}

    def columns(grid: dict) -> list[tuple]:
        chosen = [(title, images) for title, images in grid["columns"] if title in kept]
        return [("unlearned model" if title == own else title, images) for title, images in chosen]

    return [grid | {"columns": columns(grid)} for grid in grids]


@contextlib.contextmanager
def _workers(run: Run, models: dict[str, config.Model], looks: bool) -> Iterator[tuple[Run, Map]]:
    """(the run that knows these weights, a function that maps pieces over workers). Pictures take one worker."""
    settings = run.settings
    known = comparison.located(run, models)
    count = (settings.evaluation.workers or settings.cluster.workers) if looks else 1
    here = settings.training.engine == "torch"
    with pool(measure.Measurer, known, models, looks, cluster=settings.cluster, workers=count, here=here) as mapped:
        yield known, mapped
