"""Promote: a trial of a sweep becomes a run folder, as if its configuration had been run alone; behind `unlearn sweep
promote`.
"""

from collections.abc import Callable

from jobs import run_folder
from jobs.evaluate import evaluate
from unlearn import config
from unlearn.data.storage import Storage
from unlearn.errors import UnlearnError
from unlearn.run import Run, resolve
from unlearn.search import alone
from unlearn.search.records import Trial
from unlearn.search.space import Sweep
from unlearn.training.export import export


def promote(
    sweep: Sweep, trial: Trial, run_dir: str, progress: Callable[[int, int], None] = lambda done, total: None,
    show_forget: bool = False, check: Callable[[], None] = lambda: None,
) -> tuple[Run, dict]:  # fmt: skip
    """Copy a trial's run folder to `run_dir`, write its configuration, and measure it on the run's held-out images.

    (the run, what is in its metrics.json). show_forget, check: as for `evaluate`. Raises UnlearnError where the trial
    is not done, its folder is gone, or run_dir holds a run.
    """
    if trial.status != "done":
        raise UnlearnError(f"{trial.id} is {trial.status}: only a trial that is done becomes a run")
    settings = alone.settings(sweep, trial, run_dir)
    source, dest = Storage(Storage(sweep.sweep_dir).where(trial.run)), Storage(settings.run_dir)
    if dest.is_file("config.yaml"):
        raise UnlearnError(f"{run_dir} holds a run: give a new folder")
    if not any(name.startswith("checkpoints/") for name in run_folder.files(source)):
        raise UnlearnError(
            f"{source.uri} holds no checkpoint: its files are gone; `unlearn run` makes the same run anew"
        )
    run_folder.copy(source, dest, check)
    dest.write("config.yaml", config.dump(settings).encode(), private=settings.names_rows)
    run = resolve(settings, measured=True)
    export(run)  # the model's card tells of this run
    return run, evaluate(run, progress, show_forget, check)
