"""How this process is asked to stop, and to say what it does.

SIGINT (Ctrl-C) and SIGTERM (Kubernetes, Slurm, a spot node) do the same: `Stopped` in the main thread, so that every `finally`
on the way out is run. SIGUSR1 prints the stack of every thread to standard error, and the process goes on.
"""

import contextlib
import faulthandler
import os
import signal
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
    """Around what sets a handler for SIGTERM of its own, as ray.init does, which ends the process with exit code 15: the handler
    from before is back behind the block, and a SIGTERM inside it is answered as before too."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as e:
        if before is _raise and e.code == signal.SIGTERM:
            raise Stopped(signal.SIGTERM) from None
        raise
    finally:
        with contextlib.suppress(ValueError):  # not the main thread: then nobody has set one
            signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: object) -> None:
    raise Stopped(number)
