"""Sweep: Ray Tune proposes points, slots of Ray Train workers run their trials, and the records keep what came of them;
behind `unlearn sweep`."""

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from jobs.cluster import connected, waiting_for
from jobs.own_cluster import variables
from jobs.sweep_state import Progress, SweepState
from unlearn import log as logs
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError, ConfigError, UnlearnError
from unlearn.models import weights
from unlearn.run import Run
from unlearn.search import records, sweep_file
from unlearn.search.records import Trial
from unlearn.search.space import FREE, Sweep

log = logging.getLogger(__name__)

# Ray Tune: no signal handler of its own, no log files that nobody reads, trials without the metric (they have failed).
TUNE = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400", "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # no report of a slot waits for it
    # MLflow: nothing is told to its makers, and a server that is gone does not hold up the sweep for minutes.
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}  # fmt: skip
SET = {"MLFLOW_TRACKING_URI": None}  # what MLflow sets, put back afterwards
PATIENCE = 60  # seconds without a slot that has started, after which it is told what is missing


def prepare(sweep: Sweep) -> None:
    """Write the sweep to its folder. Raises ConfigError where another sweep is there, WeightsError and StorageError for
    originals that are not to be had."""
    weights.located(sweep.models or ())
    storage = Storage(sweep.sweep_dir)
    if storage.is_file(records.SWEEP):
        former = sweep_file.load(storage.where(records.SWEEP))
        if former.identity() != sweep.identity():
            raise ConfigError(
                f"{sweep.sweep_dir} holds another sweep: only {', '.join(FREE)} may change; put the others back, or "
                "give another sweep_dir"
            )
    storage.write(records.SWEEP, sweep_file.dump(sweep).encode(), private=sweep.settings.names_rows)


def sweep(
    sweep: Sweep, progress: Callable[[Progress], None] = lambda now: None, check: Callable[[], None] = lambda: None,
    retry_failed: bool = False,
) -> list[Trial]:  # fmt: skip
    """Run a prepared sweep to its end, or on from where it has stopped. Returns the records of its trials.

    progress: called every second or so; check: as often, and before anything is written; what it raises ends the sweep,
    which the same call goes on with. retry_failed: whether trials that have failed are run again. Raises UnlearnError.
    """
    cluster = sweep.settings.cluster
    least = cluster.min_workers or cluster.workers
    with (
        contextlib.ExitStack() as stack,
        variables({name: os.environ.get(name, value) for name, value in (TUNE | SET).items()}),
        tempfile.TemporaryDirectory(prefix="unlearn-sweep-") as scratch,
    ):
        callbacks = _callbacks(sweep, Path(scratch))
        state = SweepState(sweep, _put, retry_failed)
        stack.enter_context(ThreadPoolExecutor(1)).submit(_check_models, state)  # while Ray starts
        stack.enter_context(connected(cluster, least * sweep.concurrent))
        import ray

        from jobs.desk import Desk

        desk = cast(Any, ray.remote(Desk)).options(num_cpus=0, max_concurrency=1000).remote(cluster.max_failures)
        with _slots(sweep, desk, scratch) as slots, _tuned(sweep, state, desk, Path(scratch), callbacks) as tuned:
            _follow(sweep, state, desk, slots, tuned, progress, check)
    return list(state.trials.values())


def _put(run: Run) -> object:
    import ray

    return ray.put(run)


def _check_models(state: SweepState) -> None:
    """Ask what all trials have in common; a point that it is not good for is told so when its turn comes."""
    with contextlib.suppress(UnlearnError):
        state.limits.check(state.sweep.settings)


def _callbacks(sweep: Sweep, scratch: Path) -> list:
    """Ray Tune's, where the sweep wants some; before anything is started, since they may not be had."""
    if not sweep.log_to:
        return []
    from jobs.callbacks import wanted

    return wanted(sweep, scratch)


def _follow(
    sweep: Sweep, state: SweepState, desk: Any, slots: list[Future], tuned: Future,
    progress: Callable[[Progress], None],
    check: Callable[[], None],
) -> None:  # fmt: skip
    """Take in what happens at the desk until Ray Tune is done."""

    began, waited, at, fresh = time.monotonic(), False, {}, set(range(sweep.concurrent))
    while not tuned.done():
        news = _asked(desk.news.remote())
        check()
        for event in news:
            if event.kind == "go":
                at[event.point] = event.about
                _asked(desk.put.remote(state.legs(event.point, event.about)))
            elif event.kind == "taken":
                state.taken(event, time.monotonic() - began if event.slot in fresh else 0.0)
                fresh.discard(event.slot)
            elif event.kind == "row":
                state.rows[event.trial] = event.about
            elif event.kind == "again":
                state.warm.discard(event.slot)
                log.warning("trial %s goes on from its newest checkpoint: %s", event.trial, event.about)
            elif event.kind == "measured":
                state.measured(event)
            elif event.kind == "failed":
                state.failed(event)
            stage = at.get(event.point)
            if event.kind in ("go", "measured", "failed") and stage is not None:
                if reply := state.reply(event.point, stage):
                    _asked(desk.settle.remote(event.point, stage, reply))
        progress(state.progress(sweep.concurrent))
        for number, slot in enumerate(slots):
            if slot.done() and not tuned.done():
                slot.result()
                raise ClusterError(f"the workers of slot {number} have left; the same command goes on")
        if not waited and not state.warm and time.monotonic() - began > PATIENCE:
            waited = True
            if what := waiting_for(sweep.settings.cluster):
                log.warning("%s", what)
    progress(state.progress(sweep.concurrent))
    tuned.result()


def _asked(call: Any) -> Any:
    """What a call of the desk gives. ray.get would make a plain SystemExit of the signal that stops the sweep."""
    return call.future().result()


@contextlib.contextmanager
def _slots(sweep: Sweep, desk: Any, scratch: str) -> Iterator[list[Future]]:
    """The groups of workers, as many as there may be trials at one time; none is left after the block."""
    import ray
    import ray.train

    from jobs.desk import serve
    from jobs.rendezvous import torch_config
    from jobs.train import resources
    from jobs.trainer import StoppableTrainer

    cluster = sweep.settings.cluster
    with contextlib.ExitStack() as stack:
        slots = []
        for number in range(sweep.concurrent):
            trainer = StoppableTrainer(
                serve,
                train_loop_config={"desk": desk, "slot": number, "log": logs.level()},
                torch_config=torch_config("nccl" if cluster.gpus_per_worker else "gloo", cluster.timeout),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=(cluster.min_workers, cluster.workers) if cluster.min_workers else cluster.workers,
                    use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources(cluster),
                ),
                # How often the workers may die is counted by trial, at the desk.
                run_config=ray.train.RunConfig(
                    name=f"slot-{number}", storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=-1)
                ),
            )  # fmt: skip
            slots.append(stack.enter_context(trainer.fitting(lambda: None)))
        log.info("%s slots of %s workers on Ray", sweep.concurrent, cluster.workers)
        yield slots
        _asked(desk.close.remote())
        for slot in slots:  # they leave by themselves, which is quicker than to be ended
            with contextlib.suppress(Exception):
                slot.result(timeout=10)


@contextlib.contextmanager
def _tuned(sweep: Sweep, state: SweepState, desk: Any, scratch: Path, callbacks: list) -> Iterator[Future]:
    """Ray Tune in a thread of its own, over when its future is; after the block it is."""
    import ray
    from ray.exceptions import RayError

    from jobs.tuner import tune

    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(tune(sweep, state, desk, scratch, callbacks))
        except BaseException as e:
            outcome.set_exception(e)

    thread = threading.Thread(target=run, name="tune", daemon=True)
    thread.start()
    try:
        yield outcome
    except BaseException as e:
        state.stopping = True
        with contextlib.suppress(RayError):
            ray.get(desk.close.remote(), timeout=10)
        if isinstance(e, RayError):
            raise ClusterError(
                f"the cluster has failed: {str(e).splitlines()[0][:200]}; the same command goes on"
            ) from e
        raise
    finally:
        thread.join(20)
