"""What the processes of a run agree on outside of a step. Alone, without a process group, each agrees with itself."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from unlearn.errors import UnlearnError

T = TypeVar("T")


def grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def gather(value: Any) -> list:
    """One object of every rank, in every rank, in their order."""
    if not grouped():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(call: Callable[[], T]) -> T:
    """What `call` gives on rank 0, on every rank. An UnlearnError that it raises there is raised on every rank."""
    if not grouped():
        return call()
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = call()
        except UnlearnError as e:
            answer[1] = e
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def on_this_machine() -> tuple[int, int]:
    """(number of this process among those of the run on its machine, how many they are)."""
    machines = gather(_machine())
    rank = dist.get_rank() if grouped() else 0
    return machines[:rank].count(machines[rank]), machines.count(machines[rank])


def _machine() -> tuple[str, str]:
    # Containers of one machine differ in their host name, machines of one name in the number of their start.
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else ""
