"""How much memory of its own a process takes while something is done; of mapped files what was written to."""

import gc
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

_pools: list[pa.MemoryPool] = []  # kept, since what was made in a pool is given back to it


def private() -> int:
    """Bytes of this process's memory that no file holds."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell private memory")


def peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """(what the call gives, bytes by which private memory had grown at the worst moment)."""
    gc.collect()
    before = most = private()
    done = threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, private())
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        value = call()
    finally:
        done.set()
        watching.join()
    return value, max(most, private()) - before


def counted(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """(what the call gives, most bytes of Arrow's buffers, most bytes of Python's objects): those that it asked for,
    whatever the allocators keep."""
    known = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(known)
    _pools.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        value = call()
        return value, pool.max_memory(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(known)
