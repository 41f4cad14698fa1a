"""Run the workers of several runs in real processes over gloo, without Ray: quick enough to do it often."""

import logging
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import torch.multiprocessing

from unlearn import config


def together(runs: list[config.RunConfig], workers: int, kill_at: int | None = None) -> None:
    """Train the runs one after another in `workers` processes. Raises what a worker raises.

    kill_at: the last worker kills itself with SIGKILL when it has computed this step.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Forked from a process that has imported what is slow to import.
    multiprocessing.set_forkserver_preload(["deepspeed", "unlearn.training.loop", "tensorboardX"])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, (workers, str(Path(folder) / "meet"), runs, kill_at), workers, start_method="forkserver"
        )


def _process(rank: int, workers: int, meeting: str, runs: list[config.RunConfig], kill_at: int | None) -> None:
    import torch.distributed as dist

    from unlearn.training.loop import worker

    def report(row: dict) -> None:
        if row["step"] == kill_at and rank == workers - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    for run in runs:
        worker(run, report)
    dist.barrier()
    dist.destroy_process_group()
