"""The audits of a comparison: every run that is done, one after another, on workers that stay."""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from jobs import audit as audits
from jobs.pool import Map
from unlearn import documents
from unlearn import run as runs
from unlearn.audit import page
from unlearn.audit import settings as audit_settings
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError, LeaseError, MissingExtra, StorageError, UnlearnError, WorkerDied
from unlearn.models import weights
from unlearn.search import leaderboard, records
from unlearn.search.compare import Compare, Stage
from unlearn.search.records import Trial

log = logging.getLogger(__name__)

ENDS = (ClusterError, LeaseError, MissingExtra, StorageError)  # no fault of one audit: the same command goes on
KEPT = "audit"  # folder of what was measured, in that of the comparison


def audit_all(
    compare: Compare,
    final: Stage,
    trials: Sequence[Trial],
    progress: Callable[[str, int, int], None],
    check: Callable[[], None],
    retry_failed: bool = False,
) -> None:
    """Audit these runs as `unlearn audit` would each, but for those that are audited so already.

    They share workers, and what is measured of originals and oracles. An audit that fails is written down in its run's
    folder, and the others go on; it is made again with `retry_failed`, or with other options. One whose workers die
    leaves the next new ones, unless those die too. Raises UnlearnError where none could go on.
    """
    settings = audit_settings.parse(compare.audit or {}, "audit")
    options = hashlib.sha256(json.dumps(compare.audit, sort_keys=True).encode()).hexdigest()
    kept, known = Storage(compare.compare_dir).where(KEPT), {}
    died = False
    with contextlib.ExitStack() as stack:

        def new_workers() -> Callable[[], Map]:
            return functools.cache(lambda: _started(stack, audits.workers(final.settings, settings)))

        workers = new_workers()
        for number, trial in enumerate(trials):
            progress("auditing", number, len(trials))
            check()
            folder = Storage(Storage(final.sweep_dir).where(trial.run))
            if not retry_failed and _failed(folder) == options:
                continue
            try:
                if not (folder.is_file("config.yaml") and folder.is_file(f"model/{weights.CARD}")):
                    record = Storage(final.sweep_dir).where(f"{records.FOLDER}/{trial.id}.json")
                    raise UnlearnError(f"{folder.uri}: its files are gone; delete {record}, and the run is made again")
                run = runs.resolve(runs.load(folder.uri), measured=True, known=known)
                known |= weights.located([run.settings.model.weights, *run.settings.evaluation.oracles], known)
                run = replace(run, sources=known | run.sources)
                audits.audit(run, settings, check=check, kept=kept, shared=workers, unless_made=True)
                folder.delete(leaderboard.AUDIT_FAILED)
                died = False
            except Exception as e:
                again, died = died, isinstance(e, WorkerDied)
                if isinstance(e, ENDS) and (again or not died):
                    raise
                if died:
                    stack.close()  # what this audit has sent them waits there, and may kill them once more
                    workers = new_workers()
                message = _told(e)
                told = "the audit of %s has failed: %s; --retry-failed makes it again once the cause is mended"
                log.error(told, trial.id, message, exc_info=not isinstance(e, UnlearnError))
                failed = {"options": options, "message": message}
                folder.write(leaderboard.AUDIT_FAILED, json.dumps(failed).encode())
                for name in (audits.RESULTS, page.NAME):  # of other options
                    folder.delete(name)
        progress("auditing", len(trials), len(trials))


def _started(stack: contextlib.ExitStack, workers: contextlib.AbstractContextManager[Map]) -> Map:
    """The workers, until the stack ends. That there are none is no fault of the audit that asks for them first."""
    try:
        return stack.enter_context(workers)
    except UnlearnError:
        raise
    except Exception as e:
        raise ClusterError(f"the workers of the audits cannot be started: {e}; the same command goes on") from e


def _failed(folder: Storage) -> str | None:
    """With which options an audit of this run has failed, and none was made since."""
    if folder.is_file(audits.RESULTS) or not folder.is_file(leaderboard.AUDIT_FAILED):
        return None
    return documents.mapping(folder.read(leaderboard.AUDIT_FAILED)).get("options")


def _told(error: Exception) -> str:
    """An exception in a line; of a worker's, what the worker has met."""
    cause = getattr(error, "cause", None) or error
    told = str(cause) if isinstance(cause, UnlearnError) else f"{type(cause).__name__}: {cause}"
    return " ".join(told.split())[:500]
