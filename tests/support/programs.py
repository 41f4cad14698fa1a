"""Programs that a test starts, and ports for them."""

import contextlib
import shutil
import socket
import sysconfig
from pathlib import Path

import pytest


def program(name: str) -> str:
    """A program beside this Python or on PATH; skips where it is not installed."""
    beside = Path(sysconfig.get_path("scripts"), name)
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
