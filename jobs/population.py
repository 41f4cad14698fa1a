"""Population based training of the learning rate, as a search algorithm of Ray Tune.

All points train at one time, stage by stage. Behind each stage the worst quarter, by the first objective, goes on from
the checkpoints of the best quarter, with a learning rate near theirs (Jaderberg et al., 2017). What a point then says
of itself is where its weights come from: the rates they were trained with, as training.lr and training.lr_changes.

Ray's own PopulationBasedTraining is not used. It draws from Python's global generator and keeps what it has decided in
Ray Tune's snapshots, so a sweep that is killed would go on with other points; here each decision is a function of the
records. Its trials must all live and hold a checkpoint of Ray's, while ours are run folders.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

from ray.tune.search import Searcher

from jobs import run_folder
from jobs.suggestions import Stateless
from jobs.sweep_state import SweepState
from unlearn.data.storage import Storage
from unlearn.search import population
from unlearn.search.space import Sweep

log = logging.getLogger(__name__)


class Population(Stateless):
    """What Ray Tune asks for trials: one stage of one point at a time."""

    def __init__(self, sweep: Sweep, state: SweepState):
        super().__init__()
        self.sweep, self.state = sweep, state
        drawn = islice(sweep.drawn(), sweep.budget.points)
        self.points = {f"p{number:03d}": parameters for number, parameters in enumerate(drawn)}
        self.running: set[str] = set()  # trials of Ray Tune
        self.turns = self._turns()

    def suggest(self, trial_id: str) -> dict | str | None:
        turn = None if self.state.stopping else next(self.turns, None)
        if turn is None:
            return Searcher.FINISHED
        point, stage = turn
        if point is None:  # the others of this stage are not over
            return None
        self.running.add(trial_id)
        return {"point": point, "stage": stage}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.running.discard(trial_id)

    def _turns(self) -> Iterator[tuple[str | None, int]]:
        """(point, stage) one after the other; (None, stage) as long as those of the stage run."""
        for stage in count():
            for point, parameters in self.points.items():
                if not self.state.behind(point, stage):
                    continue
                now = self.state.point(point).parameters if self.state.known(point) else parameters
                if self.state.prepare(point, now):
                    yield point, stage
            while self.running:
                yield None, stage
            if not any(map(self.state.to_run, self.points)):
                return
            self._renew(stage)

    def _renew(self, stage: int) -> None:
        """Have the worst go on from the best behind a stage, where that has not been done."""
        every = [self.state.point(point) for point in self.points]
        if any(len(trial.stages) > stage + 1 for point in every for trial in point.trials):
            return  # the next stage has begun, so it was done
        # A point that has lost a trial goes on as it is.
        whole = [point for point in every if all(len(trial.stages) > stage for trial in point.trials)]
        for heir in population.heirs(self.sweep, whole, stage):
            donors = {(trial.seed, trial.model): trial for trial in self.state.point(heir.donor).trials}
            for trial in self.state.point(heir.point).trials:
                donor = donors[trial.seed, trial.model]
                if population.ORIGIN in trial.stages[stage]:
                    continue
                folder = Storage(self.sweep.sweep_dir)
                run_folder.replace(Storage(folder.where(donor.run)), Storage(folder.where(trial.run)))
                told = trial.stages[stage] | {population.ORIGIN: heir.donor, population.LR: heir.lr}
                stages = [*trial.stages[:stage], told]
                self.state.renewed(replace(trial, parameters=heir.parameters, stages=stages))
            log.info("%s goes on from %s with a learning rate of %.3g", heir.point, heir.donor, heir.lr)
