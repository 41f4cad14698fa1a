"""Run the workers of several runs in real processes over gloo, without Ray: quick enough to do it often."""

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.multiprocessing

from unlearn import config
from unlearn.registry import METHODS
from unlearn.run import Run, resolve

# What is slow to import, the last one by DeepSpeed at its first step. Workers are forked from a process that has them.
SLOW = [
    "deepspeed", "unlearn.training.loop", "unlearn.models.mae", "tensorboardX",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]  # fmt: skip


def together(
    runs: list[config.RunConfig], workers: int, kill_at: int | None = None, kill_in: str = "report",
    sign: signal.Signals | None = signal.SIGKILL
) -> None:  # fmt: skip
    """Train the runs one after another in `workers` processes. Raises what a worker raises.

    kill_at: the last worker kills itself when it has computed this step; kill_in: as it reports the step, or while the
    step is saved, "written" between its file and COMMIT, "committed" right after COMMIT; sign: the signal, None to
    sleep for ever.
    """
    in_group(
        _train,
        workers,
        [resolve(run) for run in runs],
        workers,
        kill_at,
        kill_in,
        sign,
        timeout=runs[0].cluster.timeout,
    )


def in_group(call: Callable, workers: int, *arguments, timeout: float = 600) -> None:
    """call(rank, *arguments) in each of `workers` processes that form a group. Raises what one of them raises.

    timeout: seconds that a collective operation may take.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    multiprocessing.set_forkserver_preload(SLOW)
    # Configurations are read where they are unpickled: after the methods of this test are known.
    methods, pickled = dict(METHODS.entries), pickle.dumps((call, arguments))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process,
            (workers, str(Path(folder) / "meet"), methods, pickled, timeout),
            workers,
            start_method="forkserver",
        )


def _process(rank: int, workers: int, meeting: str, methods: dict[str, str], pickled: bytes, timeout: float) -> None:
    import torch.distributed as dist

    gc.freeze()  # DeepSpeed collects garbage with every engine, and need not look through all that is imported
    METHODS.entries.update(methods)
    call, arguments = pickle.loads(pickled)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers, timeout=limit)
    call(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def _train(rank: int, runs: list[Run], workers: int, kill_at, kill_in, sign) -> None:
    from unlearn.training.checkpoint import Checkpoints
    from unlearn.training.loop import worker

    def die_at(step: int, where: str) -> None:
        if (step, where, rank) == (kill_at, kill_in, workers - 1):
            os.kill(os.getpid(), sign) if sign else time.sleep(3600)

    def report(row: dict) -> None:
        die_at(row["step"], "report")

    save = Checkpoints.save

    def watched(self, fragments, state, rank, gather, *more):
        places = iter(("written", "committed"))

        def gather_or_die(value):
            place = next(places)
            if place == "committed":  # rank 0 has committed when the last gather lets the others through
                found = gather(value)
            die_at(state.step, place)
            return found if place == "committed" else gather(value)

        save(self, fragments, state, rank, gather_or_die, *more)

    Checkpoints.save = watched
    for run in runs:
        worker(run.with_workers(workers), report)
