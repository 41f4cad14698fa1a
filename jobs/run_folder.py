"""Copies of run folders: a trial that becomes a run of its own, or goes on from where another has come."""

import shutil
from collections.abc import Callable

from jobs.evaluate import RESULTS
from unlearn.data.storage import Storage, local_copy
from unlearn.evaluation import report

# Of the run alone: what it is, where it ran, and what it came to.
LEFT = ("config.yaml", "lease.json", RESULTS, report.NAME)


def files(folder: Storage) -> list[str]:
    """What of a run folder another one may be given."""
    return [name for name in folder.files() if name not in LEFT]


def copy(source: Storage, dest: Storage, check: Callable[[], None] = lambda: None) -> None:
    """Give `dest` these files. check: asked before each; what it raises ends the copy. Raises StorageError."""
    for name in files(source):
        check()
        with local_copy(source.where(name)) as file, dest.writing(name) as path:
            shutil.copyfile(file, path)


def replace(source: Storage, dest: Storage) -> None:
    """The same, with nothing else in `dest` afterwards."""
    for name in dest.files():
        dest.delete(name)
    copy(source, dest)
