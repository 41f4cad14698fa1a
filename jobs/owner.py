"""The owner of a run folder: this process, from before anything is read in it until the command is over."""

import contextlib
import logging
import os
from collections.abc import Iterator

from unlearn import lease, signals
from unlearn.data.storage import Storage
from unlearn.errors import StorageError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def owned(run_dir: str, command: str, advice: str = lease.ADVICE) -> Iterator[lease.Lease]:
    """Own the run folder for the length of a command of `unlearn`, which others are told. Raises LeaseError where
    another process owns it, and at the end where it was lost; ask the lease before what must not be written then."""
    Storage(run_dir).check_writable()
    job = os.environ.get(signals.JOB)
    what = f"unlearn {command}" + (f" (job {job})" if job else "")
    with lease.held(run_dir, what, say=lambda text: log.warning("%s", text), advice=advice) as held:
        try:
            yield held
        except StorageError:
            if held.lost == lease.DELETED:  # whatever is not there is gone with the folder
                held.check()
            raise


def how_to_go_on() -> str:
    """What the user does where a run has stopped, in a message."""
    job = os.environ.get(signals.JOB)
    return f"`unlearn jobs resume {job}` goes on" if job else "add --resume to go on"
