"""Which rank is missing: the state of each rank of a process group, kept in the group's store or beside its file.

A collective that times out does not say which rank is missing. So every rank writes its position at every step, without
waiting for the device, and a thread of it writes a heartbeat; a rank whose collective has failed writes that as well. A
rank that has not done so a moment later is missing: it hangs elsewhere, or its process has stopped or died.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world

from unlearn.errors import ClusterError

log = logging.getLogger(__name__)

EVERY = 2.0  # seconds between two beats
ANSWER = 10.0  # seconds that the other ranks have to notice that their collective has failed, too
STALLED = 0.8  # share of the timeout after which a stall is reported: NCCL ends the process at the full timeout


class Heartbeat:
    """Heartbeat of one rank; in a process without a group it only reports a stall. timeout: of the group's collectives,
    in seconds."""

    def __init__(self, timeout: float):
        self.timeout, self.group = timeout, dist.is_available() and dist.is_initialized()
        self.rank, self.workers = (dist.get_rank(), dist.get_world_size()) if self.group else (0, 1)
        self._over, self._state = threading.Event(), "waits"
        self._board = _board() if self.group else None
        self.at("the start")

    def at(self, place: str) -> None:
        """Record the place in the run that this rank has reached, as in "step 12"."""
        self._place, self._since = place, time.time()
        if self._board:
            self._board.write(self.rank, self._now())  # some microseconds: no answer is waited for

    def limit_groups(self) -> None:
        """Apply the run's timeout to every existing process group: DeepSpeed creates some of its own, with torch's
        default."""
        for group in list(_world.pg_map) if self.group else ():
            _set_pg_timeout(timedelta(seconds=self.timeout), group)

    def beat(self) -> None:
        """Until `stop`: write where this rank is."""
        board, reported = _board() if self.group else None, 0.0
        while True:
            if board:
                board.write(self.rank, self._now())
            if time.time() - self._since > self.timeout * STALLED and reported != self._since:
                reported = self._since
                log.warning(
                    "rank %s has been at %s for %.0f s; the stacks of its threads are on standard error",
                    self.rank,
                    self._place,
                    time.time() - reported,
                )
                faulthandler.dump_traceback(file=2)
            if self._over.wait(EVERY):
                return

    def stop(self) -> None:
        self._over.set()

    def ended(self, error: Exception) -> Exception:
        """What ended this rank's part of the run, in words: where a collective has failed, which ranks are missing.
        Tells the others."""
        if not self.group:
            return error
        lost = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)
        self._state = "lost" if lost else f"ended by a {type(error).__name__}"  # not its message, which may name images
        reports: dict[int, dict] = {}
        # In a thread, since a store whose process is stopped blocks without a timeout.
        exchange = threading.Thread(target=self._tell_and_ask, args=(reports, lost), daemon=True)
        exchange.start()
        exchange.join(ANSWER * 2)
        if not lost:
            return error
        if not reports and self.rank:
            missing = ["rank 0, in whose process the group meets, does not answer"]
        else:
            missing = [
                _told(rank, reports.get(rank))
                for rank in range(self.workers)
                if reports.get(rank, {}).get("state") != "lost"
            ]
        return ClusterError(
            (
                f"rank {self.rank} of {self.workers} was left alone at {self._place} (cluster.timeout is "
                f"{self.timeout:g} s): "
            )
            + ("; ".join(missing) or f"no rank is missing, so look at the network: {str(error)[:200]}")
        )

    def _tell_and_ask(self, reports: dict[int, dict], ask: bool) -> None:
        """Tell that this rank has ended; then ask the others until each has told the same, or ANSWER is over."""
        board, until = _board(), time.monotonic() + ANSWER
        board.write(self.rank, self._now())
        while ask:
            for rank in range(self.workers):
                if text := board.read(rank):
                    reports[rank] = json.loads(text)
            if (
                all(reports.get(rank, {}).get("state", "waits") != "waits" for rank in range(self.workers))
                or time.monotonic() > until
            ):
                return
            time.sleep(0.2)

    def _now(self) -> str:
        about = {"place": self._place, "since": self._since, "now": time.time(), "state": self._state}
        return json.dumps(about | {"host": socket.gethostname(), "pid": os.getpid()})


@contextlib.contextmanager
def beating(timeout: float) -> Iterator[Heartbeat]:
    """The heartbeat of this rank while it runs the block.

    Raises ClusterError, which names who is missing, in place of the error of a collective that has failed.
    """
    heart = Heartbeat(timeout)
    thread = threading.Thread(target=heart.beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield heart
    except Exception as e:
        error = heart.ended(e)
        if error is e:
            raise
        raise error from e
    finally:
        heart.stop()
        thread.join(EVERY)


class _StoreBoard:
    """What each rank writes, in the group's store; each thread needs one of its own."""

    def __init__(self, store: dist.Store):
        apart = dist.PrefixStore("heartbeat", store)
        # torch does not declare `clone`.
        self._store: dist.Store = apart.clone()  # pyright: ignore[reportAttributeAccessIssue]

    def write(self, rank: int, text: str) -> None:
        self._store.set(str(rank), text)

    def read(self, rank: int) -> bytes | None:
        return self._store.get(str(rank)) if self._store.check([str(rank)]) else None


class _FileBoard:
    """The same, in files beside that of a FileStore, which never shrinks."""

    def __init__(self, path: str):
        self._path = path

    def write(self, rank: int, text: str) -> None:
        part = Path(f"{self._path}-rank-{rank}.{threading.get_ident()}")
        part.write_text(text)
        part.replace(f"{self._path}-rank-{rank}")

    def read(self, rank: int) -> bytes | None:
        try:
            return Path(f"{self._path}-rank-{rank}").read_bytes()
        except FileNotFoundError:
            return None


def _board() -> _StoreBoard | _FileBoard:
    store = _get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.FileStore):
        return _FileBoard(store.path)  # pyright: ignore[reportAttributeAccessIssue]  torch does not declare `path`
    return _StoreBoard(store)


def _told(rank: int, about: dict | None) -> str:
    if about is None:
        return f"rank {rank} has never told where it is"
    who = f"rank {rank} (process {about['pid']} on {about['host']})"
    if about["state"] != "waits":
        return f"{who} {about['state']}"
    return (
        f"{who} is missing: at {about['place']} since {_time(about['since'])}, last heard of at {_time(about['now'])}"
    )


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S} UTC"
