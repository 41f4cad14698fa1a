"""A read that hangs is made a second time beside the first, and the answer that comes first counts.

A server that stalls one request of many would else cost each time the whole time-out of a connection. How long is far
too long depends on what the reads before took, so that a slow link is not asked for everything twice.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FACTOR = 4  # times as long as the slowest of the last reads is far too long
KEPT = 64  # reads whose times are known
MOST = 3  # attempts at one read that run at the same time


class Hedge:
    """Thread-safe. Each attempt runs in a thread of its own, which nobody waits for once another has answered."""

    def __init__(self):
        self._took: deque[float] = deque(maxlen=KEPT)  # seconds
        self._lock = threading.Lock()

    def first(self, call: Callable[[], T], least: float) -> T:
        """What `call` returns, which must be safe to call several times at once. Raises what its last attempt raises.

        least: seconds until it is called again; FACTOR times what the slowest of the last calls took, where that is
        more; and twice that until the third attempt. 0: it is called once.
        """
        if not least:
            return call()
        answers: queue.SimpleQueue[tuple[T | None, float, BaseException | None]] = queue.SimpleQueue()
        with self._lock:
            wait = max(least, FACTOR * max(self._took, default=0))
        self._start(call, answers)
        started, failed = 1, 0
        while True:
            try:
                value, took, error = answers.get(timeout=wait if started < MOST else None)
            except queue.Empty:
                self._start(call, answers)
                started, wait = started + 1, 2 * wait
                continue
            if error is None:
                with self._lock:  # of none that comes too late: its client may have waited out a time-out
                    self._took.append(took)
                return value  # pyright: ignore[reportReturnType]  without an error it is what `call` returned
            failed += 1
            if failed == started:
                raise error

    def _start(self, call: Callable[[], T], answers: queue.SimpleQueue) -> None:
        def attempt() -> None:
            began = time.monotonic()
            try:
                value, error = call(), None
            except BaseException as e:
                value, error = None, e
            answers.put((value, time.monotonic() - began, error))

        # Not of a pool, whose threads the end of the process waits for.
        threading.Thread(target=attempt, daemon=True, name="s3-read").start()
