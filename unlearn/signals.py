"""How this process is asked to stop, and to say what it does.

SIGINT (Ctrl-C) and SIGTERM (Kubernetes, Slurm, a spot node) do the same: `Stopped` in the main thread, so that every
`finally` on the way out is run. SIGUSR1 prints the stack of every thread to standard error, and the process goes on.
"""

import contextlib
import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Iterator

# Seconds in which a second signal is the first one again: whoever stops a job (`timeout`, Slurm) sends it to the
# process and to its group.
AGAIN = 2.0
# The environment variable that holds the id of the submitted job that this process is.
JOB = "UNLEARN_JOB"
_last = -math.inf  # when this process was asked to stop


class Stopped(SystemExit):
    """The process was asked to stop; where nobody handles it, it ends without a traceback. code: 128 + the signal, as a
    shell has it; hint: how to go on, for the user."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.hint = ""


def listen() -> None:
    """Let SIGINT and SIGTERM raise `Stopped`. To be called in the main thread.

    SIGINT stays ignored where the process was started so (a shell's background process), except in a submitted job,
    which `unlearn jobs stop` sends it to.
    """
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN or JOB in os.environ:
        signal.signal(signal.SIGINT, _raise)
    show_stacks()


def show_stacks() -> None:
    """Let SIGUSR1 print the stack of every thread to standard error. To be called once in a process, in any thread of
    it.

    A handler of faulthandler's that walks through all threads does so while they run, and ends the process with a
    segmentation fault where it meets a frame that is just being made. So the handler only wakes a thread, which holds
    the interpreter's lock.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    faulthandler.register(signal.SIGUSR1, file=write, all_threads=False)
    threading.Thread(target=_print_stacks, args=(read,), name="stacks", daemon=True).start()


def _print_stacks(asked: int) -> None:
    while os.read(asked, 1 << 16):
        time.sleep(0.1)  # the handler writes a line at a time
        os.set_blocking(asked, False)
        with contextlib.suppress(BlockingIOError):
            while os.read(asked, 1 << 16):
                pass
        os.set_blocking(asked, True)
        faulthandler.dump_traceback(file=2)


@contextlib.contextmanager
def kept(*others: signal.Signals) -> Iterator[None]:
    """Around what starts or ends processes, and takes the handler for SIGTERM away: ray.init sets one of its own, and
    ray.shutdown the system's, which ends this process without a word.

    The processes get no SIGTERM, as Ray sees to it for SIGINT: one that is sent to all of a job, as Slurm does, would
    end them before this process can stop them in order. One that comes meanwhile, or one of `others`, is answered
    behind the block, by the handler from before.
    """
    before = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *others})
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _raise(number: int, frame: object) -> None:
    global _last
    before, _last = _last, time.monotonic()
    if _last - before > AGAIN:
        raise Stopped(number)
