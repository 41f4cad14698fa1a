"""What is known of the trials of a sweep: one JSON file a trial in the sweep's folder, which is the source of truth.

SWEEP_DIR/sweep.yaml           as it was sent
          trials/ID.json       a Trial, written whole at each change of its status
          runs/ID/             its run folder
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from unlearn.data.storage import Storage
from unlearn.errors import DataError
from unlearn.search.objectives import Constraint, Figures, Objective, feasible

FOLDER, RUNS, SWEEP = "trials", "runs", "sweep.yaml"
# stopped: ended early by stop_early, its figures those of where it ended.
Status = Literal["running", "done", "failed", "infeasible", "stopped"]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a point with one seed and one model.

    parameters: the keys that the point sets, with their values. run: its run folder, relative to the sweep's. figures:
    of the trained model by name, derived ones among them, see unlearn/search/objectives.py; original, oracle: of the
    models it is compared with; held_out: its figures on the held-out images, once they were measured. stages: [{"step",
    "figures"}] of each time that it was measured, the last one among them. seconds: "start" until the first step,
    "train", "measure", "other". warm: whether its workers had run a trial before.
    """

    id: str
    point: str
    seed: int
    model: str | None
    parameters: dict[str, Any]
    status: Status = "running"
    message: str | None = None
    run: str = ""
    config_hash: str = ""
    figures: Figures = field(default_factory=dict)
    original: Figures = field(default_factory=dict)
    oracle: Figures = field(default_factory=dict)
    held_out: Figures | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    slot: int | None = None
    warm: bool = False
    started: str = ""
    ended: str = ""

    @property
    def over(self) -> bool:
        return self.status != "running"


class Trials:
    """The records in a sweep's folder."""

    def __init__(self, storage: Storage):
        self.storage = storage

    def write(self, trial: Trial) -> None:
        text = json.dumps(asdict(trial), indent=1, allow_nan=False)
        self.storage.write(f"{FOLDER}/{trial.id}.json", text.encode())

    def read(self, id: str) -> Trial:
        """Raises StorageError where there is none, DataError where it is damaged."""
        name = f"{FOLDER}/{id}.json"
        try:
            tree = json.loads(self.storage.read(name))
            known = {one.name for one in fields(Trial)}
            trial = Trial(**{key: value for key, value in tree.items() if key in known})
            if trial.status not in get_args(Status):
                raise ValueError
            return trial
        except (ValueError, TypeError, AttributeError):
            raise DataError(
                f"{self.storage.where(name)} is no record of a trial: delete it, and the trial is run again"
            ) from None

    def all(self) -> list[Trial]:
        """Every trial, in the order of their points, seeds and models."""
        names = sorted(name for name in self.storage.files(FOLDER) if name.endswith(".json"))
        return [self.read(name.rpartition("/")[2].removesuffix(".json")) for name in names]


@dataclass(frozen=True)
class Point:
    """What is known of one point: the mean and the spread (standard deviation, 0 for a single trial) of each figure
    that all its trials have that are done. feasible: whether its run is valid and its means keep the constraints."""

    id: str
    parameters: dict[str, Any]
    trials: tuple[Trial, ...]
    mean: Figures
    spread: Figures
    feasible: bool

    @property
    def complete(self) -> bool:
        """Whether every trial has ended well, so that the point may be compared with others."""
        return all(trial.status == "done" for trial in self.trials)

    @property
    def message(self) -> str | None:
        """Why it is not complete, where a trial says so."""
        return next((trial.message for trial in self.trials if trial.message), None)


def point(id: str, trials: Sequence[Trial], constraints: Iterable[Constraint] = ()) -> Point:
    """One point of its trials."""
    done = [trial for trial in trials if trial.status == "done"]
    names = sorted(set.intersection(*(set(trial.figures) for trial in done))) if done else []
    values = {name: [trial.figures[name] for trial in done] for name in names}
    mean = {name: math.fsum(each) / len(each) for name, each in values.items()}
    spread = {name: statistics.stdev(each) if len(each) > 1 else 0.0 for name, each in values.items()}
    return Point(id, trials[0].parameters, tuple(trials), mean, spread, bool(done) and feasible(mean, constraints))


def points(trials: Iterable[Trial], constraints: Iterable[Constraint] = ()) -> list[Point]:
    """The points of these trials, in order."""
    constraints, by_point = list(constraints), {}
    for trial in trials:
        by_point.setdefault(trial.point, []).append(trial)
    return [point(id, each, constraints) for id, each in by_point.items()]


def losses(point: Point, objectives: Sequence[Objective]) -> list[float] | None:
    """Its means by objective, so that smaller is better; None where it does not have them all."""
    if not all(objective.figure in point.mean for objective in objectives):
        return None
    return [objective.loss(point.mean) for objective in objectives]


def now() -> str:
    """The time as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
