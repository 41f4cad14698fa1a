"""Metrics of a run while it trains: metrics.jsonl and TensorBoard events in the run folder."""

import contextlib
import json
import logging
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from unlearn import patience
from unlearn.data.storage import Storage, told
from unlearn.errors import StorageError

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
# Progress before the first row: {"latents": row groups whose latents are made, "of": row groups in all}.
LATENTS = "latents.json"
# dense bf16 peaks of one device, FLOP/s, from the vendors' data sheets
PEAK = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


class MetricsLog:
    """Rows of one run. A thread publishes them, so that training never waits for the storage, and tries again.

    A resumed run keeps the rows up to the step it goes on from. every: seconds between two publications at least.
    wait: seconds that `flush` and `close` wait for a storage that fails; by default a minute, or what S3 is given.
    """

    def __init__(self, run_dir: str, start: int, every: float = 2, wait: float | None = None):
        from tensorboardX import SummaryWriter

        self._storage, self._every = Storage(run_dir), every
        self._patience = max(60, patience.seconds()) if wait is None else wait
        rows = [row for row in read(run_dir) if row["step"] <= start]
        self._text = b"".join(_line(row) for row in rows)  # of all rows; the thread alone changes it
        self._temporary = None if self._storage.is_local() else tempfile.TemporaryDirectory()
        self._folder = self._temporary.name if self._temporary else self._storage.where("tensorboard")
        self._board = SummaryWriter(self._folder, purge_step=start or None)
        self._attached: dict[str, bytes] = {}
        self._sent: dict[
            str, bytes | int
        ] = {}  # file beside the rows -> what of it is published: its content, or its size
        self._published = 0  # bytes of the text; 0: the published file is to be rewritten
        self._rows: list[dict] = []  # not yet taken by the thread
        self._waiting = self._closed = False
        self._added = self._done = 0  # rows, and how many of them are published
        self._error: BaseException | None = None  # error of the last attempt
        self._broken: BaseException | None = None  # the exception that ended the thread
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._publish, name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close(self._patience if error is None else min(5, self._patience))
        except StorageError:
            if error is None:
                raise

    def add(self, row: dict) -> None:
        with self._changed:
            self._rows.append(row)
            self._added += 1
            self._changed.notify_all()

    def attach(self, name: str, data: bytes) -> None:
        """Publish a small file of the run folder together with the next row."""
        with self._changed:
            self._attached[name] = data

    def flush(self, wait: float | None = None) -> None:
        """Wait until all rows are published. Raises StorageError where the storage fails for too long."""
        with self._changed:
            wanted, self._waiting = self._added, True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._done >= wanted or self._broken, self._patience if wait is None else wait
            )
            self._waiting = False
            if self._done < wanted:
                raise self._error or StorageError(
                    f"{self._storage.where(METRICS)}: the storage has not answered for long"
                )

    def close(self, wait: float | None = None) -> None:
        """Publish what is left, and end. Raises StorageError as `flush` does."""
        try:
            self.flush(wait)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._thread.join(timeout=5)  # it is a daemon: where the storage hangs, it is left behind
            self._board.close()
            if self._temporary:
                self._temporary.cleanup()

    def _publish(self) -> None:
        """What the thread does, until it is asked to end."""
        pause = 0.0
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or (self._waiting and not self._error), pause)
                    self._changed.wait_for(lambda: self._closed or self._done < self._added)
                    if self._closed:
                        return
                    rows, self._rows, seen, failed = self._rows, [], self._added, self._error is not None
                    attached = dict(self._attached)
                began, error = time.monotonic(), None
                self._take(rows)
                try:
                    self._send(attached)
                except StorageError as e:
                    error = e
                    if not failed:
                        log.warning(
                            "the metrics of this run cannot be published now, and are kept to be tried again: %s", e
                        )
                # Less often where it takes long: on S3 the whole file is sent.
                pause = max(self._every, 10 * (time.monotonic() - began)) if error is None else self._every
                with self._changed:
                    self._error, self._done = error, self._done if error else seen
                    self._changed.notify_all()
        except BaseException as e:
            with self._changed:
                self._error = self._broken = e
                self._changed.notify_all()

    def _take(self, rows: list[dict]) -> None:
        for row in rows:
            self._text += _line(row)
            for key, value in row.items():
                if key != "step":
                    self._board.add_scalar(key, value, row["step"])

    def _send(self, attached: dict[str, bytes]) -> None:
        with told(self._storage.where(METRICS)):
            path = Path(self._storage.where(METRICS))
            if (
                self._storage.is_local()
                and self._published
                and path.is_file()
                and path.stat().st_size == self._published
            ):
                with open(path, "ab") as file:
                    file.write(self._text[self._published :])
            else:
                self._storage.write(METRICS, self._text)
            self._published = len(self._text)
            for name, data in attached.items():
                if self._sent.get(name) != data:
                    self._storage.write(name, data)
                    self._sent[name] = data
            self._board.flush()
            for path in Path(self._folder).iterdir() if self._temporary else ():
                if (size := path.stat().st_size) != self._sent.get(path.name):
                    self._storage.write(f"tensorboard/{path.name}", path.read_bytes())
                    self._sent[path.name] = size


def _line(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


def read(run_dir: str) -> list[dict]:
    """The rows that a run has published so far."""
    storage = Storage(run_dir)
    return _rows(storage.read(METRICS)) if storage.is_file(METRICS) else []


def _rows(text: bytes) -> list[dict]:
    """A last line without its end is still being written."""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def latents(run_dir: str) -> list[dict]:
    """How far the latents are, or nothing."""
    storage = Storage(run_dir)
    return [json.loads(storage.read(LATENTS))] if storage.is_file(LATENTS) else []


class Follower:
    """Follows a run from outside; of its rows only what is new is read."""

    def __init__(self, run_dir: str):
        self.run_dir, self._storage = run_dir, Storage(run_dir)
        self._newest: dict | None = None
        self._end, self._last = 0, b""  # bytes that were read, and the last line of them

    def newest(self) -> dict | None:
        """The newest row, or before there is one how far the latents are. Raises StorageError and ValueError, without
        waiting for a storage that is away: who follows asks again."""
        with patience.at_most(0):
            self.rows()
            return self._newest or next(iter(latents(self.run_dir)), None)

    def rows(self) -> list[dict]:
        """The rows that are new since the last call; all of them, where a resumed run has written them anew."""
        if not self._storage.is_file(METRICS):
            return []
        with told(self._storage.where(METRICS)), self._storage.open(METRICS) as file:
            if file.size() == self._end:
                return []
            start = self._end - len(self._last)
            text = file.read_at(file.size() - start, start) if file.size() > start else b""
            if not text.startswith(self._last):
                self._end, self._last, text = 0, b"", file.read_at(file.size(), 0)
        whole = text[len(self._last) : text.rfind(b"\n") + 1]
        if whole:
            self._end += len(whole)
            self._last = whole.splitlines(keepends=True)[-1]
        rows = _rows(whole)
        self._newest = rows[-1] if rows else self._newest
        return rows


def follow(run_dir: str, work: Future, progress: Callable[[dict], None], every: float = 1) -> None:
    """Until `work` is done, call `progress` with the newest row of a run as it appears in the run's storage."""
    follower, last, done = Follower(run_dir), None, False
    while not done:
        done, row = bool(wait([work], timeout=every).done), None
        with contextlib.suppress(StorageError, ValueError):  # what cannot be read now is read later
            row = follower.newest()
        if row and row != last:
            last = row
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
