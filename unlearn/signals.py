"""How this process is asked to stop, and to say what it does.

SIGINT (Ctrl-C) and SIGTERM (Kubernetes, Slurm, a spot node) do the same: `Stopped` in the main thread, so that every `finally`
on the way out is run. SIGUSR1 prints the stack of every thread to standard error, and the process goes on.
"""

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator

# The environment variable that holds the id of the submitted job that this process is.
JOB = "UNLEARN_JOB"


class Stopped(SystemExit):
    """The process was asked to stop; where nobody handles it, it ends without a traceback. code: 128 + the signal, as a shell
    has it; hint: how to go on, for the user."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.hint = ""


def listen() -> None:
    """Let SIGINT and SIGTERM raise `Stopped`. To be called in the main thread.

    SIGINT stays ignored where the process was started so (a shell's background process), except in a submitted job, which
    `unlearn jobs stop` sends it to.
    """
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN or JOB in os.environ:
        signal.signal(signal.SIGINT, _raise)
    show_stacks()


def show_stacks() -> None:
    """Let SIGUSR1 print the stack of every thread to standard error."""
    faulthandler.register(signal.SIGUSR1, file=2)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Around what starts processes, and sets a handler for SIGTERM of its own: ray.init does both.

    The processes get no SIGTERM, as Ray sees to it for SIGINT: one that is sent to all of a job, as Slurm does, would end them
    before this process can stop them in order. One that comes meanwhile is answered behind the block, by the handler from before.
    """
    before = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _raise(number: int, frame: object) -> None:
    raise Stopped(number)
