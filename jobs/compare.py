"""Compare: methods side by side on warm workers, and their leaderboard; behind `unlearn compare`."""

import json
import logging
from collections.abc import Callable

from jobs import compare_audits, train
from jobs import sweep as sweeps
from jobs.sweep_state import Progress
from unlearn.audit import settings as audit_settings
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, UnlearnError
from unlearn.search import compare as comparisons
from unlearn.search import leaderboard, leaderboard_page
from unlearn.search.compare import Compare, Stage
from unlearn.search.records import Trial, Trials
from unlearn.search.space import Parameters, canonical

log = logging.getLogger(__name__)


def prepare(compare: Compare) -> None:
    """Check every method, and write the comparison to its folder. Raises ConfigError, also where another one is
    there."""
    for label in compare.methods:
        for parameters in compare.candidates(label):
            try:
                train.check_method(compare.final({label: parameters}).settings)
            except ConfigError as e:
                raise ConfigError(f"methods.{label}: {e}") from None
    if compare.audit is not None:
        audit_settings.parse(compare.audit, "audit")
    storage = Storage(compare.compare_dir)
    if storage.is_file(comparisons.FILE) and comparisons.load(compare.compare_dir).identity() != compare.identity():
        raise ConfigError(
            f"{compare.compare_dir} holds another comparison: only concurrent and audit may change; put the others "
            "back, or give another compare_dir"
        )
    storage.write(comparisons.FILE, comparisons.dump(compare).encode(), private=compare.settings.names_rows)


def compare(
    compare: Compare, progress: Callable[[str, int, int], None] = lambda part, done, total: None,
    check: Callable[[], None] = lambda: None, retry_failed: bool = False,
) -> dict:  # fmt: skip
    """Run a prepared comparison to its end, or on from where it has stopped; write leaderboard.json and report.html.
    Returns what is in leaderboard.json.

    progress: called every second or so with "tuning", "comparing" or "auditing", and how many of its runs are over;
    check: as for a sweep. Raises UnlearnError.
    """
    chosen = {label: compare.candidates(label)[0] for label in compare.methods}
    if compare.tunes:
        tuning = compare.tuning()
        trials = sweeps.sweep(tuning, _telling("tuning", tuning, progress), check, retry_failed)
        chosen = {label: _best(compare, label, trials) for label in compare.methods}
    final = compare.final(chosen)
    trials = sweeps.sweep(final, _telling("comparing", final, progress), check, retry_failed)
    if compare.audit is not None:
        done = [trial for trial in trials if trial.status == "done"]
        compare_audits.audit_all(compare, final, done, progress, check, retry_failed)
    return _write(compare, chosen, trials, final)


def _telling(part: str, stage: Stage, progress: Callable[[str, int, int], None]) -> Callable[[Progress], None]:
    total = len(stage.grid()) * len(stage.pairs())
    return lambda now: progress(part, sum(trial.over for trial in now.trials), total)


def report(compare: Compare) -> dict:
    """Write the leaderboard anew from what has been run so far. Raises UnlearnError where nothing has."""
    chosen = {label: compare.candidates(label)[0] for label in compare.methods}
    if compare.tunes:
        trials = Trials(Storage(compare.tuning().sweep_dir)).all()
        chosen = {label: _best(compare, label, trials) for label in compare.methods}
    final = compare.final(chosen)
    trials = Trials(Storage(final.sweep_dir)).all()
    asked = {canonical(parameters) for parameters in chosen.values()}
    if not any(trial.status == "done" and canonical(trial.parameters) in asked for trial in trials):
        raise UnlearnError(
            f"{compare.compare_dir}: no run with the settings chosen is done, so there is nothing to compare; "
            "`unlearn compare` makes them"
        )
    return _write(compare, chosen, trials, final)


def _write(compare: Compare, chosen: dict[str, Parameters], trials: list[Trial], final: Stage) -> dict:
    document = leaderboard.document(compare, chosen, trials, Storage(final.sweep_dir))
    folder = Storage(compare.compare_dir)
    folder.write(leaderboard.NAME, json.dumps(document, indent=1, allow_nan=False).encode())
    folder.write(leaderboard_page.NAME, leaderboard_page.html(document).encode())
    return document


def _best(compare: Compare, label: str, trials: list[Trial]) -> Parameters:
    """The settings of a method that were best on training images; the first where none came to an end."""
    known = {canonical(trial.parameters): trial.figures for trial in trials if trial.status == "done"}
    candidates = compare.candidates(label)
    tried = [
        (sum(figures[name] for name in compare.tune.choose), number)
        for number, parameters in enumerate(candidates)
        if (figures := known.get(canonical(parameters))) and all(name in figures for name in compare.tune.choose)
    ]
    if not tried:
        log.warning("no setting of %s came to an end in tuning: its first one is taken", label)
    return candidates[min(tried)[1] if tried else 0]
