"""What was read last, within a limit in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Recent:
    """An LRU cache with a limit in bytes. The newest value always stays, so that a value larger than the limit can
    be used. Thread-safe: a value that several threads request is read once."""

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._reading: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], tuple[Any, int]]) -> Any:
        """The value of a key; read() -> (value, its bytes), called if it is not cached."""
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key][0]
            value, size = read()
            with self._lock:
                self._held[key] = value, size
                self._bytes += size
                self._evict()
            return value

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._held

    @property
    def limit(self) -> int:
        with self._lock:
            return self._limit

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return self._bytes

    def drop(self, key: Hashable) -> None:
        """Remove a value that is no longer needed."""
        with self._lock:
            self._bytes -= self._held.pop(key, (None, 0))[1]

    def resize(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._evict()

    def _evict(self) -> None:
        while self._bytes > self._limit and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1][1]
