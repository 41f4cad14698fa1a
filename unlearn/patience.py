"""How long an outage of the storage is waited out: a server that fails, a network that is gone.

`storage.patience` of the configuration, else UNLEARN_STORAGE_PATIENCE, else two minutes.
"""

import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from unlearn.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "UNLEARN_STORAGE_PATIENCE"
DEFAULT = 120.0
MOST = 12 * 3600.0  # a lease lasts longer than the patience, and a day at most
PAUSE = 5.0  # seconds between two attempts, at most
TOLD_AGAIN = 30.0  # seconds after which an outage is told once more
_configured: float | None = None
_most: ContextVar[float] = ContextVar("most", default=math.inf)
_told = -math.inf  # when an outage was told last

T = TypeVar("T")


def use(seconds: float | None) -> None:
    """Take the patience of a configuration for this process; None where it gives none."""
    global _configured
    _configured = seconds


def seconds() -> float:
    """How long an outage is waited out here. Raises ConfigError where the variable is no number."""
    if _configured is not None:
        return min(_configured, _most.get())
    text = os.environ.get(VARIABLE, "")
    try:
        given = float(text) if text else DEFAULT
    except ValueError:
        given = math.nan
    if not 0 <= given <= MOST:
        raise ConfigError(f"{VARIABLE}={text[:40]!r}: give seconds, a number from 0 to {MOST:.0f}")
    return min(given, _most.get())


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Wait no longer than this in the block, where what fails is tried again or left out by the caller."""
    before = _most.set(min(seconds, _most.get()))
    try:
        yield
    finally:
        _most.reset(before)


def outlast(call: Callable[[], T], fault: Callable[[Exception], str | None], where: str) -> T:
    """What `call` returns, made again with growing, random pauses while what it raises may pass by itself.

    fault: what is wrong, in words, of an error that may pass; None of any other one. The last error is raised as it is.
    """
    global _told
    patience, began, attempt = seconds(), None, 0
    while True:
        try:
            return call()
        except Exception as e:
            what, now = fault(e), time.monotonic()
            began = now if began is None else began
            left = began + patience - now
            if what is None or left <= 0:
                raise
        if now - _told > TOLD_AGAIN:
            _told = now
            log.warning("%s: %s; trying again, for %.0f s at most (storage.patience)", where, what, left)
        time.sleep(min(left, PAUSE, 0.25 * 2**attempt) * random.uniform(0.5, 1))
        attempt = min(attempt + 1, 10)
