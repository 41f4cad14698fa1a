"""Programs that a test starts, and ports for them."""

import contextlib
import random
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


def bound(command: list[str]) -> list[str]:
    """The same command, which the kernel (Linux) kills when the thread that starts it ends, however that ends: a test
    run that is killed leaves no server behind."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on. They lie below those that the kernel hands out, so that no connection of another
    test takes one before the program listens there, and above those of Ray's workers."""
    draw, found = random.SystemRandom(), []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port, tried = draw.randint(20000, 32000), stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                tried.bind(("127.0.0.1", port))
                found.append(port)
    return found
