"""What every place to run a job agrees on: the names of its states, what is sent, and the interface of a backend."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Protocol

from unlearn import config, documents
from unlearn.config import RunConfig
from unlearn.data import pack_file
from unlearn.data.pack_file import Packing
from unlearn.errors import ClusterError
from unlearn.log import message
from unlearn.search import sweep_file
from unlearn.search.space import Sweep
from unlearn.signals import JOB

# Environment variables of a job beside JOB, its id: the configuration, where it does not lie in the run folder; the
# names that must be set there.
CONFIG, REQUIRED = "UNLEARN_CONFIG", "UNLEARN_REQUIRED_ENV"
GOES_ON = "the same `unlearn submit` goes on from the newest checkpoint"
FORMER_DRIVERS = {"jobs.train": "run", "jobs.evaluate": "evaluate"}


class NoSuchJob(ClusterError):
    """A place that answers knows no job of that id."""


class State(StrEnum):
    """The same states for every backend. Queued: nothing of it exists yet; starting: its driver does not run yet."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Job:
    """What is known of a job. submitted: seconds since 1970; message: one line, why it is as it is."""

    id: str
    state: State
    run_dir: str
    submitted: float | None
    message: str = ""

    @property
    def live(self) -> bool:
        return self.state in (State.QUEUED, State.STARTING, State.RUNNING)


@dataclass(frozen=True)
class Request:
    """What is sent, the same to every backend; no value of a secret is in it.

    id: the same for the same request; driver, arguments: `python -m unlearn DRIVER SOURCE ARGUMENTS`; config: YAML of
    the whole RunConfig; source: where the job finds it, a file in the run folder or env:UNLEARN_CONFIG (see
    jobs/submit.py); env: names of variables that must be set where the job runs.
    """

    id: str
    run_dir: str
    driver: str
    arguments: tuple[str, ...] = ()
    source: str = f"env:{CONFIG}"
    env: tuple[str, ...] = ()
    config: str = field(default="", repr=False)

    @property
    def command(self) -> list[str]:
        """Arguments of Python."""
        return ["-m", "unlearn", self.driver, self.source, *self.arguments]

    @property
    def variables(self) -> dict[str, str]:
        """The job's environment besides what the place itself sets."""
        variables = {JOB: self.id} | ({CONFIG: self.config} if self.source == f"env:{CONFIG}" else {})
        return variables | ({REQUIRED: ",".join(self.env)} if self.env else {})

    def dump(self) -> str:
        """JSON of all but the configuration."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "config"})

    @classmethod
    def load(cls, text: str, config: str = "") -> "Request":
        """What `dump` made, former versions' too. Raises ValueError, KeyError or TypeError for anything else."""
        tree = documents.from_json(text)
        if former := tree.pop("module", None):  # how a driver was named before
            tree["driver"] = FORMER_DRIVERS[former]
        return cls(**tree | {"arguments": tuple(tree["arguments"]), "env": tuple(tree["env"]), "config": config})


def settings(request: Request) -> RunConfig | Sweep | Packing:
    """What the job's driver is given. Raises ConfigError."""
    kinds = {"sweep": sweep_file, "pack": pack_file}
    return kinds.get(request.driver, config).read(request.config, request.id)


def dump(settings: RunConfig | Sweep | Packing) -> str:
    """YAML of it."""
    if isinstance(settings, Sweep):
        return sweep_file.dump(settings)
    return pack_file.dump(settings) if isinstance(settings, Packing) else config.dump(settings)


def is_ours(text: str) -> bool:
    """Whether this is what `Request.dump` makes; others may use our labels, too."""
    try:
        Request.load(text)
        return True
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


class Backend(Protocol):
    """A place to run jobs. Everything raises UnlearnError; a job that is not there is a NoSuchJob."""

    where: str  # as the user names it in --to

    @property
    def remote(self) -> bool:
        """Whether a path of this machine may mean nothing there."""
        ...

    def plan(self, request: Request) -> str:
        """YAML of what `start` would send. No server is contacted."""
        ...

    def start(self, request: Request) -> Job:
        """Start the job, or start it again where an earlier attempt under the same id is over."""
        ...

    def jobs(self) -> list[Job]:
        """Every job of ours, the newest first."""
        ...

    def get(self, id: str) -> Job: ...

    def again(self, id: str) -> Job:
        """Start a job that is over again, as it was sent: same code, image and secrets, whatever the settings of this
        backend."""
        ...

    def logs(self, id: str, follow: bool) -> Iterator[str]:
        """What the job's driver has printed, in pieces; with `follow` until the job is over."""
        ...

    def stop(self, id: str) -> None:
        """Ask the job to stop, and return when it is over or beyond reach."""
        ...

    def remove(self, id: str) -> None:
        """Forget a job that is over, its log too. Its run folder stays."""
        ...


def next_attempt(id: str, before: list[str]) -> str:
    """The name of the next attempt of a job: ID, then ID-r2, ID-r3 ...: not every place takes a name twice."""
    numbers = [int(name.removeprefix(f"{id}-r")) if name != id else 1 for name in before]
    return f"{id}-r{max(numbers) + 1}" if numbers else id


def error_line(log: str) -> str:
    """The line that says why a driver ended: its message to the user, else the last one."""
    return (_told(log, "error") or _lines(log) or [""])[-1][:500]


def warning_line(log: str) -> str:
    """The last warning of a driver, or nothing."""
    return (_told(log, "warning") or [""])[-1][:500]


def _told(log: str, level: str) -> list[str]:
    return [line for line in _lines(log) if line.startswith(f"{level}:")]


def _lines(log: str) -> list[str]:
    """A driver's lines, those that are JSON as they read where they are not."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return [f"{parts[0]}: {parts[1]}" if (parts := message(line)) else line for line in lines]
