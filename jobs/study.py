"""Optuna as a source of points, through Ray Tune's OptunaSearch, and where its study lies."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from ray.tune.search.optuna import OptunaSearch

from jobs.sweep_state import SweepState
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, MissingExtra
from unlearn.search.records import Point, losses
from unlearn.search.space import Parameters, Sweep, canonical

STUDY = "study.db"  # in the sweep's folder


class Study(OptunaSearch):
    """Optuna, whose storage outlives this process. Each proposal depends on the seed, its number and what was told
    before alone, so a sweep that is started again proposes what it would have proposed."""

    def __init__(self, sweep: Sweep, state: SweepState, scratch: Path):
        """scratch: for the study's file, where the sweep's folder is on S3. Raises ConfigError, MissingExtra."""
        self.sweep, self._where = sweep, StudyStorage(sweep, scratch)
        directions = ["min" if objective.direction == "minimise" else "max" for objective in sweep.wanted]
        super().__init__(
            space=self._define, metric=[objective.figure for objective in sweep.wanted], mode=directions,
            storage=self._where.storage,
            study_name=sweep.name, sampler=self._sampler_of(0),
        )  # fmt: skip
        self._setup_study(directions)
        self._remember(state)

    @property
    def _study(self) -> Any:
        """OptunaSearch declares that it may be None."""
        return self._ot_study

    def _sampler_of(self, number: int):
        import optuna

        seed = (self.sweep.search_seed * 1_000_003 + number) % (1 << 32)
        if self.sweep.search_by == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        # Optuna's own 50 would leave a small budget with its first generation, which is drawn at random.
        size = min(50, max(4, (self.sweep.budget.points or 200) // 4))
        return optuna.samplers.NSGAIISampler(population_size=size, seed=seed)

    def _define(self, trial: Any) -> Parameters:
        return self.sweep.assembled(lambda key, domain: domain.suggest(key, trial))

    def _remember(self, state: SweepState) -> None:
        """Propose again what was proposed and never told, what is not over, and the points that the study does not
        know."""
        import optuna

        states, told, asked = optuna.trial.TrialState, set(), set()
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == states.WAITING:
                asked.add(canonical(trial.system_attrs.get("fixed_params", {})))
            elif trial.state != states.RUNNING:
                told.add(canonical(trial.params))
            else:  # of a process that has ended
                self._study.tell(trial.number, state=states.FAIL)
                if trial.params:
                    self._study.enqueue_trial(trial.params)
                    asked.add(canonical(trial.params))
        for point in map(state.point, state.ids.values()):
            free = ((key, domain) for key, domain in self.sweep.search.items() if not domain.same_as)
            fixed = {key: domain.told(point.parameters[key]) for key, domain in free if key in point.parameters}
            if canonical(fixed) not in asked and (state.to_run(point.id) or canonical(fixed) not in told):
                self._study.enqueue_trial(fixed)

    def propose(self, number: int) -> tuple[str, Parameters]:
        self._study.sampler = self._sampler_of(number)
        trial = self._study.ask()
        name = f"trial {trial.number}"
        self._ot_trials[name] = trial
        return name, self._define(trial)

    def tell(self, name: str, point: Point) -> None:
        values = losses(point, self.sweep.wanted) if point.complete else None
        if values is None:
            # A point that is not valid or has failed, or was given up, has no values.
            self.on_trial_complete(name, None, error=not any(trial.status == "stopped" for trial in point.trials))
        else:
            for bound in self.sweep.bounds:
                self._ot_trials[name].set_constraint(str(bound), bound.violation(point.mean))
            self.on_trial_complete(name, dict(point.mean))
        self._where.save()


class StudyStorage:
    """Where Optuna keeps its study: the sweep's `storage`, or SQLite in the sweep's folder, by way of `scratch` where
    that is S3."""

    def __init__(self, sweep: Sweep, scratch: Path):
        """Raises ConfigError where `storage` cannot be used, MissingExtra."""
        try:
            import optuna
        except ImportError:
            raise MissingExtra("optuna", "sweep", f"search_by: {sweep.search_by}") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.folder, self.file = Storage(sweep.sweep_dir), None
        if sweep.storage is None:
            self.file = Path(self.folder.where(STUDY)) if self.folder.is_local() else scratch / STUDY
            if not self.folder.is_local() and self.folder.is_file(STUDY):
                self.file.write_bytes(self.folder.read(STUDY))
        try:
            self.storage = optuna.storages.RDBStorage(sweep.storage or f"sqlite:///{self.file}")
        except Exception as e:  # whatever the database's driver raises
            where = f"storage {sweep.storage.partition('://')[0]}://..." if sweep.storage else f"{self.file}"
            raise ConfigError(f"{where}: Optuna cannot use it: {str(e).splitlines()[0][:160]}") from None

    def save(self) -> None:
        """Put a whole copy of the file into a sweep folder on S3."""
        if self.file and not self.folder.is_local():
            copy = self.file.with_suffix(".copy")
            with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            self.folder.write(STUDY, copy.read_bytes())
            copy.unlink()
