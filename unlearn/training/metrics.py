"""What a run says while it trains: metrics.jsonl and TensorBoard events in the run folder, rewritten whole."""

import contextlib
import json
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from unlearn.data.storage import Storage
from unlearn.errors import StorageError

METRICS = "metrics.jsonl"
# What a run says before its first row: {"latents": row groups whose latents are made, "of": row groups in all}.
LATENTS = "latents.json"
# dense bf16 peaks of one device, FLOP/s, from the makers' data sheets
PEAK = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


class MetricsLog:
    """Rows of one run. A resumed run keeps the rows up to the step it goes on from."""

    def __init__(self, run_dir: str, start: int, every: float = 2):
        from tensorboardX import SummaryWriter

        self._storage, self._every, self._last = Storage(run_dir), every, 0.0
        self.rows = [row for row in read(run_dir) if row["step"] <= start]
        self._temporary = None if self._storage.is_local() else tempfile.TemporaryDirectory()
        self._folder = self._temporary.name if self._temporary else self._storage.where("tensorboard")
        self._board = SummaryWriter(self._folder, purge_step=start or None)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(key, value, row["step"])
        if time.monotonic() - self._last > self._every:
            self.flush()

    def flush(self) -> None:
        """Publish what there is."""
        self._storage.write(METRICS, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self._board.flush()
        if self._temporary:
            for path in Path(self._folder).iterdir():
                self._storage.write(f"tensorboard/{path.name}", path.read_bytes())
        self._last = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._board.close()
        if self._temporary:
            self._temporary.cleanup()


def read(run_dir: str) -> list[dict]:
    """The rows that a run has published so far."""
    storage = Storage(run_dir)
    return [json.loads(line) for line in storage.read(METRICS).splitlines()] if storage.is_file(METRICS) else []


def latents(run_dir: str) -> list[dict]:
    """How far the latents are, or nothing."""
    storage = Storage(run_dir)
    return [json.loads(storage.read(LATENTS))] if storage.is_file(LATENTS) else []


def follow(run_dir: str, work: Future, progress: Callable[[dict], None], every: float = 1) -> None:
    """Until `work` is done, call `progress` with the newest row of a run as it appears in the run's storage."""
    last, done = None, False
    while not done:
        done = bool(wait([work], timeout=every).done)
        with contextlib.suppress(StorageError):  # a picture of progress is not worth a run
            found = read(run_dir)[-1:] or latents(run_dir)
            if found and found[0] != last:
                last = found[0]
                progress(last)


def peak_memory(device: torch.device) -> float:
    """GiB: the most the device, or this process on a CPU, has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Share of the device's bf16 peak, where the device is a known one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops_per_second / peak for key, peak in PEAK.items() if key in name), None)
