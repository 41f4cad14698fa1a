"""Submit a run as a job and look after it: one face for this machine, a Ray cluster and Kubernetes; behind `unlearn
submit` and `unlearn jobs`.

What is sent: the driver's name, where its configuration lies, the names of environment variables that must be set
there, and, to a Ray cluster, the code. Never the value of a secret. The same request is the same job: its id is made of
what is sent, so a second submission finds the first, and one after a failure goes on in its run folder.

The configuration travels in the run folder, as configs/HASH.yaml: named by its content, so that what a job was sent
stays as it was, for a resume too, whatever is sent to that folder later. It may name images or persons, and clusters
write what is in the environment of a job to their logs and show it in their API. So a run folder that cannot be written
from here (an S3 that only the cluster reaches) is good only for a configuration that names none: that one goes as an
environment variable.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.backends import base
from jobs.backends.base import CONFIG, GOES_ON, Backend, Job, NoSuchJob, Request, State, warning_line
from unlearn import config, lease, patience
from unlearn.data.pack_file import Packing
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError, ConfigError, StorageError
from unlearn.search import space

# driver, a command of `unlearn` -> what it is given beside its configuration
DRIVERS = {"run": ("--resume",), "pretrain": ("--resume",), "evaluate": (), "sweep": (), "pack": ()}
Settings = config.RunConfig | space.Sweep | Packing  # of a run, of the driver `sweep`, of `pack`
CONFIGS = "configs"  # the folder in a run folder
# An environment variable holds 128 KiB, and on its way through a command line it is quoted.
LARGEST = 64 << 10
PATIENCE = 60  # seconds that a place may be silent
AT_HAND = 5  # seconds that a storage is waited for which may be reached by the cluster alone


def request(
    run: Settings, driver: str = "run", arguments: Sequence[str] = (), env: Sequence[str] = (), name: str | None = None,
    elsewhere: bool = False,
) -> Request:  # fmt: skip
    """What is sent for this run. name: the readable part of the job's id, else the run's name; elsewhere: the job finds
    its Ray cluster there, whatever cluster.address says here. Raises ConfigError."""
    if elsewhere:
        run = run.elsewhere()
    if driver not in DRIVERS:
        raise ConfigError(f"--driver {driver}: give {', '.join(DRIVERS)}")
    for variable in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise ConfigError(
                f"--env {variable.partition('=')[0]}: give the name alone. Values do not travel: set the variable "
                "where the job runs"
            )
    text, given = base.dump(run), (*DRIVERS[driver], *arguments)
    told = json.dumps([run.model_dump(mode="json"), driver, given], sort_keys=True)
    id = f"{_label(name or run.name)}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    source = f"{run.run_dir}/{CONFIGS}/{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    return Request(id, run.run_dir, driver, given, source, tuple(sorted(set(env))), text)


def _label(name: str) -> str:
    """A name as DNS-1035 wants it, short enough for a RayJob's 47 characters with our hash behind it."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (label if label[:1].isalpha() else f"run-{label}")[:34].strip("-")


def backend(to: str, *, working_dir: str | None = None, **kubernetes) -> Backend:
    """The place that --to names. working_dir: for a Ray cluster; "none", a folder, or by default the checkout that this
    package is imported from, unless the head is this machine; kubernetes: see jobs.backends.kubernetes. Raises
    ConfigError."""
    if to.startswith(("http://", "https://")):
        from jobs.backends.ray_jobs import RayJobs

        _only("Kubernetes", to, kubernetes)
        root = Path(__file__).parents[1]
        if working_dir is None and RayJobs(to).remote and (root / "pyproject.toml").exists():
            working_dir = str(root)
        return RayJobs(to, None if working_dir in (None, "none") else str(Path(working_dir).absolute()))
    _only("a Ray cluster (http://HEAD:8265)", to, {"working_dir": working_dir})
    if to == "local":
        from jobs.backends.local import Local

        _only("Kubernetes", to, kubernetes)
        return Local()
    if to == "k8s" or to.startswith("k8s:"):
        from jobs.backends.kubernetes import Kubernetes

        return Kubernetes(
            to.removeprefix("k8s").removeprefix(":") or None, **{k: v for k, v in kubernetes.items() if v}
        )
    raise ConfigError(f"--to {to}: give local, http://HEAD:8265 or k8s[:CONTEXT]")


def _only(where: str, to: str, options: dict) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(f"--{name.replace('_', '-')} is for {where}; --to {to} does not know it")


def submit(place: Backend, sent: Request, mounted: bool = False) -> tuple[Job, bool]:
    """Start the job, unless it is there already: (the job, whether it was started now). One that failed or was stopped
    is started again. mounted: the run folder is a path that all nodes share. Raises UnlearnError."""
    settings = base.settings(sent)
    if place.remote and not mounted:
        for key, uri in settings.locations().items():
            if not uri.startswith("embedded:") and Storage(uri).is_local():
                raise ConfigError(
                    f"{key} {uri} is a path of this machine, and {place.where} runs on others: give s3://bucket/prefix "
                    f"(--set {key}=...), or --mounted where every node has this path"
                )
    known = place.jobs()
    mine = next((job for job in known if job.id == sent.id), None)
    if mine and (mine.live or mine.state == State.SUCCEEDED):
        return mine, False
    if busy := next((job for job in known if job.live and job.run_dir == sent.run_dir), None):
        raise ClusterError(
            f"{sent.run_dir}: job {busy.id} ({busy.state}) writes there; stop it first, or give another run_dir"
        )
    # Out of reach from here: the job itself is refused, as where its owner is elsewhere.
    with contextlib.suppress(StorageError), patience.at_most(AT_HAND):
        if (owner := lease.owner_of(sent.run_dir)) and owner.gone() is False:
            raise ClusterError(f"{sent.run_dir} is in use by {owner}: wait until it ends, or give another run_dir")
    return place.start(_stored(sent, settings, place)), True


def _stored(sent: Request, settings: Settings, place: Backend) -> Request:
    """The request, its configuration put where the job finds it. Raises StorageError where that can be nowhere."""
    folder = Storage(sent.run_dir)
    try:
        if place.remote and folder.is_local() and not Path(folder.uri).parent.is_dir():
            raise StorageError(f"{folder.uri}: this machine has no such folder")  # mounted on the cluster's nodes alone
        with patience.at_most(AT_HAND):
            folder.write(
                sent.source.removeprefix(f"{sent.run_dir}/"), sent.config.encode(), private=settings.names_rows
            )
        return sent
    except StorageError as e:
        what = (
            "names images or persons"
            if settings.names_rows
            else "is large"
            if len(sent.config.encode()) > LARGEST
            else ""
        )
        if what:
            raise StorageError(
                f"{e}. The configuration {what}, so it goes into the run folder and not into the job's environment, "
                "which clusters write to their logs: submit from where the run folder can be written"
            ) from None
    return replace(sent, source=f"env:{CONFIG}")


def resume(place: Backend, id: str) -> Job:
    """Start a job again that failed or was stopped; it goes on from its newest checkpoint. Raises UnlearnError."""
    job = place.get(id)
    if job.live:
        raise ClusterError(f"{id} is {job.state}: there is nothing to resume")
    if job.state == State.SUCCEEDED:
        raise ClusterError(
            f"{id} has succeeded: there is nothing to resume; `unlearn jobs rm {id}` makes room for the same request"
        )
    return place.again(id)


def remove(place: Backend, id: str) -> None:
    """Forget a job that is over. Raises ClusterError where it is not."""
    job = place.get(id)
    if job.live:
        raise ClusterError(f"{id} is {job.state}: stop it first (`unlearn jobs stop {id}`)")
    place.remove(id)


def wait(
    place: Backend, id: str, progress: Callable[[dict], None] = lambda row: None,
    told: Callable[[Job], None] = lambda job: None,
    every: float = 2, retries: int = 0,
) -> Job:  # fmt: skip
    """Follow a job to its end. progress: called with the newest row that the run has written; told: with the job when
    its state or message changes, and with what its driver warns of where nothing happens for a minute; retries: how
    often it is resumed after it failed. Raises UnlearnError where nobody answers any more."""
    from unlearn.training import metrics

    last, row, warned, misses, moved, follower = None, None, "", 0, time.monotonic(), None
    while True:
        try:
            job, misses = place.get(id), 0
        except ClusterError as e:
            misses += 1
            if misses * every > PATIENCE:  # longer than a head needs to start again, or a network to come back
                lost = (
                    "forgotten there, as when a cluster's head is lost" if isinstance(e, NoSuchJob) else "out of reach"
                )
                raise type(e)(f"{e}. The job is {lost}; when the cluster is there, {GOES_ON}") from None
            if misses == 1 and last:
                told(replace(last, message=f"{e}; asking again for {PATIENCE} s"))
            time.sleep(every)
            continue
        if last is None or (job.state, job.message) != (last.state, last.message):
            told(job)
            last, moved = job, time.monotonic()
        try:
            follower = follower or metrics.Follower(job.run_dir)
            newest = follower.newest()
            if newest and newest != row and job.state not in ("queued", "starting"):
                row, moved = newest, time.monotonic()
                progress(row)
        except (StorageError, ValueError):  # a picture of progress; the run folder may be out of reach from here
            pass
        if not job.live:
            if job.state != State.FAILED or not retries:
                return job
            retries -= 1
            resume(place, id)
        elif job.state == State.RUNNING and time.monotonic() - moved > PATIENCE:
            moved, before, warned = time.monotonic(), warned, _warning(place, id)
            if warned and warned != before:
                told(replace(job, message=warned))
        time.sleep(every)


def _warning(place: Backend, id: str) -> str:
    """What a job's driver has warned of last: it says what it waits for."""
    try:
        return warning_line("".join(place.logs(id, follow=False)))
    except ClusterError:  # a log that this user may not read, or that is gone
        return ""
