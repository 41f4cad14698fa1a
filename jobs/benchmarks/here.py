"""A sweep in this process, one trial after the other, without Ray: for a machine on which processes are dear.

    python -m jobs.benchmarks.here SWEEP.yaml [--set a.b=c] [--set run.a.b=c]

Its run names `training.engine: torch`. Records, points and figures are those of `unlearn sweep`, which goes on with the
same folder, as this does.
"""

import argparse
import tempfile
from pathlib import Path

from ray.tune.search import Searcher

from jobs import sweep as job
from jobs.benchmarks import command
from jobs.desk import Event
from jobs.slots import SlotWorker
from jobs.sweep_state import SweepState
from jobs.tuner import search
from unlearn.search import sweep_file
from unlearn.search.records import Trial
from unlearn.search.space import Sweep


def played(sweep: Sweep, slot: SlotWorker, scratch: Path) -> list[Trial]:
    """The trials of a sweep that measures at the end of each, after all have been run. scratch: for Optuna's files."""
    state = SweepState(sweep, lambda run: run)
    source, asked = search(sweep, state, scratch), 0
    while isinstance(given := source.suggest(f"trial {asked}"), dict):
        for leg in state.legs(given["point"], 0):
            state.taken(Event("taken", leg.trial, leg.point, 0), 0.0)
            outcome = slot.leg(leg.run[0], leg.until, lambda row: None)
            assert outcome is not None, "this process is the first worker"
            state.measured(Event("measured", leg.trial, leg.point, 0, outcome))
        source.on_trial_complete(f"trial {asked}")
        asked += 1
    assert given == Searcher.FINISHED, "nothing runs beside it"
    return list(state.trials.values())


def main(source: str, overrides: list[str]) -> None:
    sweep = sweep_file.load(source, overrides)
    job.prepare(sweep)
    with tempfile.TemporaryDirectory() as scratch:
        trials = played(sweep, SlotWorker(), Path(scratch))
    print(f"{sum(trial.status == 'done' for trial in trials)} of {len(trials)} trials are done in {sweep.sweep_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    command.main("jobs.benchmarks.here", lambda: main(options.sweep, options.overrides))
