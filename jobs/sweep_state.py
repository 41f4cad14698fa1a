"""What a sweep knows while it runs: the points and their trials, kept in the records at each change, and what is to be
done next."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from jobs import train
from jobs.desk import Event, Leg
from jobs.sweep_limits import Limits
from unlearn import config
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError, StorageError, TrainingError, UnlearnError
from unlearn.methods import base as methods
from unlearn.planning import cost
from unlearn.run import Run, resolve
from unlearn.search import records
from unlearn.search.records import Point, Trial, Trials
from unlearn.search.space import Parameters, Sweep, canonical

log = logging.getLogger(__name__)

SAME = 3  # failures of one cause in a row that end a sweep


@dataclass
class Prepared:
    """A trial that is to be run. steps: where it is measured, its last one among them."""

    run: Run
    reference: object  # of the Run in Ray's object store
    steps: list[int]
    flops: float  # of a step


@dataclass(frozen=True)
class Progress:
    """A picture of a sweep that runs. rows: the newest row of each trial that is in training, by its id; seconds_left:
    by the pace so far, None where there is no telling."""

    trials: list[Trial]
    rows: dict[str, dict] = field(default_factory=dict)
    seconds_left: float | None = None


class SweepState:
    """Used by two threads: Ray Tune's asks for points and gives them up, the driver's takes in what happens."""

    def __init__(self, sweep: Sweep, put: Callable[[Run], object], retry_failed: bool = False):
        """put: puts a Run into Ray's object store; retry_failed: whether trials that have failed count as not yet
        run."""
        self.sweep, self.put, self.limits = sweep, put, Limits(sweep)
        self.records = Trials(Storage(sweep.sweep_dir))
        self.trials = {trial.id: trial for trial in self.records.all()}
        if retry_failed:
            again = {
                id: replace(t, status="running", message=None, ended="")
                for id, t in self.trials.items()
                if t.status == "failed"
            }
            self.trials |= again
        self.ids: dict[str, str] = {}  # canonical text of a point -> its id
        for trial in self.trials.values():
            self.ids.setdefault(canonical(trial.parameters), trial.point)
        self.prepared: dict[str, Prepared] = {}
        self.given: set[tuple[str, int]] = set()  # trials and their stages that slots have been given
        self.rows: dict[str, dict] = {}
        self.warm: set[int] = set()  # slots that have run a trial
        self.causes: list[str] = []
        self.began, self.before = time.monotonic(), _elapsed(self.trials.values())
        self.lock = threading.RLock()
        self.stopping = False

    # of Ray Tune's thread

    @property
    def ends(self) -> bool:
        """Whether no point is to be started any more."""
        budget = self.sweep.budget
        return (
            self.stopping
            or (budget.seconds is not None and self.elapsed >= budget.seconds)
            or (budget.flops is not None and self.flops() >= budget.flops)
        )

    @property
    def elapsed(self) -> float:
        """Seconds that the sweep has run, over all starts."""
        return self.before + time.monotonic() - self.began

    def flops(self) -> float:
        """FLOPs of all trials, those that still run counted in full."""
        with self.lock:
            running = {id: one.flops * one.run.steps for id, one in self.prepared.items() if not self.trials[id].over}
            return math.fsum(running.get(t.id, t.figures.get("cost.flops", 0.0)) for t in self.trials.values())

    def begin(self, parameters: Parameters) -> str | None:
        """The id of a point, whose trials are prepared as far as they are not over; None where the budget has no room
        for it.

        A point whose run is not valid is infeasible. Raises StorageError and ClusterError, which say nothing of the
        point.
        """
        key = canonical(parameters)
        if key not in self.ids:
            if self.sweep.budget.points is not None and len(self.ids) >= self.sweep.budget.points:
                return None
            self.ids[key] = f"p{len(self.ids):03d}"
        self.prepare(self.ids[key], parameters)
        return self.ids[key]

    def prepare(self, point: str, parameters: Parameters) -> bool:
        """Prepare the trials of a point as far as they are not over, as `begin` does; whether there is one to run."""
        missing = {
            id: (seed, model)
            for seed, model in self.sweep.pairs()
            if not ((trial := self.trials.get(id := self.sweep.trial_id(point, seed, model))) and trial.over)
            and id not in self.prepared
        }
        trials = {
            id: self.trials.get(id) or Trial(id, point, seed, model, parameters, run=f"{records.RUNS}/{id}")
            for id, (seed, model) in missing.items()
        }
        try:
            prepared = {id: self._prepare(trial, parameters) for id, trial in trials.items()}
        except (StorageError, ClusterError):
            raise
        except UnlearnError as e:
            for trial in trials.values():
                self._write(replace(trial, status="infeasible", message=str(e), ended=records.now()))
            return False
        with self.lock:
            self.prepared |= prepared
            for id, trial in trials.items():
                self._write(replace(trial, config_hash=prepared[id].run.settings.hash()))
        return self.to_run(point)

    def _prepare(self, trial: Trial, parameters: Parameters) -> Prepared:
        settings = self.sweep.of(parameters, trial.seed, trial.model, trial.id)
        train.check_method(settings)
        known = next((one.run.sources for one in self.prepared.values()), None)
        run = resolve(settings, known=known)
        methods.create(settings.method).restarts(run.steps)
        self.limits.check(settings)
        Storage(run.folder).write("config.yaml", config.dump(settings).encode(), private=settings.names_rows)
        work = cost.work(settings, {name: len(rows) for name, rows in run.sets.items()}, run.steps)
        return Prepared(run, self.put(run), self.sweep.stages(run.steps), work.step + work.first_stage)

    def to_run(self, point: str) -> bool:
        """Whether a trial of the point is not over."""
        with self.lock:
            return any(not trial.over for trial in self._of(point))

    def known(self, point: str) -> bool:
        with self.lock:
            return bool(self._of(point))

    def behind(self, point: str, stage: int) -> bool:
        """Whether a trial of the point is still to come to the end of a stage, or the point is not known yet."""
        with self.lock:
            trials = self._of(point)
            return not trials or any(not trial.over and len(trial.stages) <= stage for trial in trials)

    def renewed(self, trial: Trial) -> None:
        """A trial goes on as another run, which is prepared with its next stage."""
        with self.lock:
            self.prepared.pop(trial.id, None)
            self._write(trial)

    def replays(self) -> list[str]:
        """Points that were measured by another process, to be shown once more to what stops trials early."""
        return sorted(
            {trial.point for trial in self.trials.values() if trial.stages and self.sweep.stop_early != "none"}
        )

    def point(self, id: str) -> Point:
        with self.lock:
            return records.point(id, self._of(id), self.sweep.bounds)

    def _of(self, point: str) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.point == point]

    # of the driver's thread

    def legs(self, point: str, stage: int) -> list[Leg]:
        """What is to be done for the stage of a point: nothing for trials that are past it."""
        legs = []
        with self.lock:
            for trial in self._of(point):
                prepared = self.prepared.get(trial.id)
                wanted = prepared and not trial.over and len(trial.stages) <= stage
                if prepared and wanted and (trial.id, stage) not in self.given:
                    self.given.add((trial.id, stage))
                    legs.append(Leg(trial.id, point, [prepared.reference], prepared.steps[stage]))
        return legs

    def reply(self, point: str, stage: int) -> dict | None:
        """What Ray Tune is told of the stage of a point: the means of its figures; None as long as a trial is still at
        it."""
        with self.lock:
            trials = self._of(point)
            if any(not trial.over and len(trial.stages) <= stage for trial in trials):
                return None
            if any(trial.status in ("failed", "infeasible") or len(trial.stages) <= stage for trial in trials):
                return {"done": True}
            figures = [trial.stages[stage]["figures"] for trial in trials]
            names = set.intersection(*(set(each) for each in figures))
            means = {name: math.fsum(each[name] for each in figures) / len(figures) for name in names}
            step = trials[0].stages[stage]["step"]
            last = all(trial.over and len(trial.stages) == stage + 1 for trial in trials)
            if self.sweep.search_by == "pbt":  # each stage is a trial of Ray Tune, with a learning rate of its own
                last, means["training.lr"] = True, self.prepared[trials[0].id].run.settings.training.at(step).lr
            return {"done": last, "step": step, **means}

    def taken(self, event: Event, starting: float) -> None:
        """A slot has begun with a trial. starting: seconds that it took to start before its first one."""
        trial, slot = self.trials[event.trial], event.slot
        assert slot is not None, "a slot takes it"
        seconds = dict(trial.seconds)
        if cold := slot not in self.warm:
            seconds["start"] = seconds.get("start", 0.0) + starting
            self.warm.add(slot)
        self._write(replace(trial, slot=slot, warm=not cold, seconds=seconds, started=trial.started or records.now()))

    def measured(self, event: Event) -> None:
        trial, told = self.trials[event.trial], event.about
        prepared = self.prepared[trial.id]
        figures = told["figures"] | {
            "cost.flops": prepared.flops * told["step"], "cost.seconds": told["training_seconds"] or 0.0,
            "cost.steps": float(told["step"]),
        }  # fmt: skip
        seconds = {name: round(trial.seconds.get(name, 0.0) + value, 3) for name, value in told["seconds"].items()}
        done = told["step"] == prepared.run.steps
        self._write(replace(
            trial, figures=figures, original=told["original"], oracle=told["oracle"], seconds=seconds,
            steps=told["step"],
            stages=[*trial.stages, {"step": told["step"], "figures": figures}], status="done" if done else "running",
            ended=records.now() if done else "",
        ))  # fmt: skip
        self.rows.pop(trial.id, None)
        self.causes = []

    def failed(self, event: Event) -> None:
        """Raises TrainingError where the same has happened to the last ones too."""
        trial, message = self.trials[event.trial], str(event.about)
        self._write(replace(trial, status="failed", message=message, ended=records.now()))
        self.rows.pop(trial.id, None)
        log.warning("trial %s failed: %s", trial.id, message)
        self.causes.append(_cause(message))
        if self.sweep.gives_up and len(self.causes) >= SAME and len(set(self.causes[-SAME:])) == 1:
            raise TrainingError(
                f"{SAME} trials in a row failed of the same cause: {message}. The sweep has stopped; mend it, and the "
                "same command with --retry-failed goes on"
            )

    def ended(self, point: str) -> None:
        """Ray Tune is done with a point: what of it is not over was stopped early."""
        with self.lock:
            for trial in self._of(point):
                if not trial.over:
                    self._write(
                        replace(
                            trial,
                            status="stopped",
                            message=f"stopped early by {self.sweep.stop_early}",
                            ended=records.now(),
                        )
                    )
                self.prepared.pop(trial.id, None)

    def progress(self, slots: int) -> Progress:
        with self.lock:
            trials = list(self.trials.values())
        return Progress(trials, dict(self.rows), self._seconds_left(trials, slots))

    def _seconds_left(self, trials: list[Trial], slots: int) -> float | None:
        spent = [sum(trial.seconds.values()) for trial in trials if trial.status == "done"]
        wanted = min((n for n in (self.sweep.size, self.sweep.budget.points) if n is not None), default=None)
        if not spent or wanted is None:
            return None
        left = wanted * len(self.sweep.pairs()) - sum(trial.over for trial in trials)
        return max(0, left) * math.fsum(spent) / len(spent) / slots

    def _write(self, trial: Trial) -> None:
        with self.lock:
            self.records.write(trial)
            self.trials[trial.id] = trial


def _cause(message: str) -> str:
    """What several failures have in common: their message without its numbers."""
    return re.sub(r"\d+(\.\d+)?", "#", message)


def _elapsed(trials) -> float:
    """Seconds in which at least one of these trials ran."""
    spans = sorted(
        (datetime.fromisoformat(t.started), datetime.fromisoformat(t.ended)) for t in trials if t.started and t.ended
    )
    seconds, until = 0.0, None
    for start, end in spans:
        start = max(start, until) if until else start
        seconds += max(0.0, (end - start).total_seconds())
        until = max(until, end) if until else end
    return seconds
