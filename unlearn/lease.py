"""A run folder has one owner at a time: `with held(run_dir, "unlearn run a.yaml") as lease: ... lease.check() ...`

`lease.json` in the run folder names the owner and counts renewals. It is created only where it does not exist (of
several processes one succeeds), renewed by a thread, and marked as released at the end. Every change is conditional on
the content that it replaces, so no process overwrites a version that it has not read.

Clocks are assumed to run at the same rate everywhere, not to agree. Another process watches the file, and takes it over
when it has not changed for as long as its owner said (60 s, and on S3 as long again as an outage is waited out). The
owner regards itself as lost when it could not renew for the same time, counted from before its last renewal. Times of
day are compared only to take over a lease at once that is older by more than half an hour than it may be. A write of a
former owner that is in flight when its lease expires cannot be stopped.

On the owner's own machine its process is looked up: a run that was killed can be resumed at once there. The process
that called `held` owns the folder; a forked child or a worker does not.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_type_hints

from unlearn import documents, patience
from unlearn.data.storage import Storage
from unlearn.errors import LeaseError, StorageError

NAME = "lease.json"
SECONDS = 60.0
ADVICE = ". Or give another run_dir"
DELETED = f"its {NAME} was deleted"
CLOCKS_AGREE = timedelta(minutes=30)  # S3 itself refuses a client whose clock is 15 minutes off


@dataclass(frozen=True)
class Owner:
    """What lease.json says. place, birth: where and when the process began, so that it can be looked up; token: of this
    one lease; since, renewed: UTC; seconds: how long the lease lasts from each renewal."""

    command: str
    host: str
    pid: int
    place: str
    birth: str
    token: str
    since: str
    renewed: str
    seconds: float
    renewals: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host}, since {self.since}, last renewed {self.renewed})"

    def gone(self) -> bool | None:
        """Whether it no longer owns the folder; None where that cannot be determined from here now."""
        if self.released:
            return True
        if self.place == _place() and (gone := _ended(self.pid, self.birth)) is not None:
            return gone
        age = datetime.now(UTC) - datetime.fromisoformat(self.renewed).astimezone(UTC)
        return True if age > timedelta(seconds=self.seconds) + CLOCKS_AGREE else None


class Lease:
    """A lease that this process holds."""

    def __init__(self, storage: Storage, owner: Owner, start: float):
        self._storage, self._owner, self._process = storage, owner, os.getpid()
        self._renewed, self._lost, self._trouble = start, "", ""
        self._over = threading.Event()

    @property
    def lost(self) -> str:
        """Why this process may no longer write to the run folder; empty as long as it may."""
        if not self._lost and self._storage.is_local() and not Path(self._storage.where(NAME)).exists():
            self._lost = DELETED  # on S3 it is found at the next renewal
        if self._lost or _elapsed() - self._renewed < self._owner.seconds:
            return self._lost
        return f"the lease could not be renewed for {self._owner.seconds:.0f} s{self._trouble}"

    def check(self) -> None:
        """Raise LeaseError where the lease is lost: the run is to stop before it writes anything more."""
        if (lost := self.lost) == DELETED:
            raise LeaseError(
                f"{self._storage.uri} was deleted while it was written to, or its {NAME} was: the run has ended, and "
                "what it had written may be gone; start it again"
            )
        if lost:
            raise LeaseError(
                f"{self._storage.uri} is no longer owned by this process: {lost}. The same command goes on once no "
                "other works there (a run's with --resume)"
            )

    def _keep(self) -> None:
        while not self._over.wait(self._owner.seconds / 4) and not self._lost:
            try:
                self._renew()
                self._trouble = ""
            except StorageError as e:
                self._trouble = f" ({e})"

    def _renew(self, released: bool = False) -> None:
        """Write the next renewal. Sets `_lost` where another process owns the folder. Raises StorageError."""
        for _ in range(3):
            start, record = _elapsed(), self._storage.read_version(NAME)
            owner = _parse(record[0]) if record else None
            if record is None or owner is None or owner.token != self._owner.token:
                self._lost = f"{owner or 'another process'} has taken it over" if record else DELETED
                return
            if owner.released:
                return
            now = _now()
            changed = replace(owner, renewals=owner.renewals + 1, renewed=now, released=released)
            if self._storage.replace(NAME, _json(changed), record[1]):
                self._renewed = start
                return

    def _release(self) -> None:
        self._over.set()
        with patience.at_most(5), contextlib.suppress(StorageError):  # it will expire
            self._renew(released=True)


@contextlib.contextmanager
def held(
    run_dir: str, what: str, seconds: float | None = None, say: Callable[[str], None] = lambda text: None,
    advice: str = ADVICE,
) -> Iterator[Lease]:  # fmt: skip
    """Own the run folder until the end of the block.

    what: the command, for the messages that others see; seconds: how long the folder stays taken after this process has
    died, by default a minute, and on S3 longer than an outage that is waited out; say: called with a text that says
    what is waited for; advice: how the refusal ends, what else can be done. An owner
    that cannot be looked up from here is watched until it renews or its lease expires.
    Raises LeaseError where another process owns the folder, and at the end where the lease was lost meanwhile.
    """
    storage = Storage(run_dir)
    if seconds is None:
        seconds = SECONDS if storage.is_local() else SECONDS + patience.seconds()
    lease = _acquire(storage, what, seconds, say, advice)
    threading.Thread(target=lease._keep, name="lease", daemon=True).start()
    try:
        yield lease
    finally:
        if os.getpid() == lease._process:
            lease._release()
    if lease._lost:
        lease.check()


def owner_of(run_dir: str) -> Owner | None:
    """Who owns a run folder, as far as can be determined without waiting. Raises StorageError."""
    record = Storage(run_dir).read_version(NAME)
    owner = _parse(record[0]) if record else None
    return owner if owner and not owner.gone() else None


def _acquire(storage: Storage, what: str, seconds: float, say: Callable[[str], None], advice: str = ADVICE) -> Lease:
    own = Owner(
        command=what, host=socket.gethostname(), pid=os.getpid(), place=_place(), birth=_birth(os.getpid()) or "",
        token=uuid.uuid4().hex, since=_now(), renewed=_now(), seconds=seconds,
    )  # fmt: skip
    seen, until = None, 0.0
    while True:
        start, record = _elapsed(), storage.read_version(NAME)
        if not record:
            if storage.create(NAME, _json(own)):
                return Lease(storage, own, start)
            continue
        owner, version = _parse(record[0]), record[1]
        gone = owner.gone() if owner else None
        if gone is False or (gone is None and seen not in (None, version)):
            who = (
                f"{owner}: wait until it ends, or stop it (kill {owner.pid} on {owner.host})"
                if owner
                else "another process"
            )
            raise LeaseError(f"{storage.uri} is in use by {who}{advice}")
        if gone is None:
            lasts = owner.seconds if owner else SECONDS
            if seen is None:
                seen, until = version, time.monotonic() + lasts
                say(
                    f"{storage.uri} was in use by {owner or f'whoever wrote its damaged {NAME}'}: waiting up to "
                    f"{lasts:.0f} s for a sign of life"
                )
            if time.monotonic() < until:
                time.sleep(min(2, lasts / 20))
                continue
        start = _elapsed()
        if storage.replace(NAME, _json(own), version):
            if not (owner and owner.released):
                say(f"{storage.uri} is taken over from {owner or 'a process'} that has ended")
            return Lease(storage, own, start)


def _json(owner: Owner) -> bytes:
    return json.dumps(asdict(owner), indent=1).encode()


def _parse(data: bytes) -> Owner | None:
    """None where it is damaged."""
    try:
        tree = documents.from_json(data)
        owner = Owner(**{name: kind(tree[name]) for name, kind in get_type_hints(Owner).items()})
        datetime.fromisoformat(owner.renewed).astimezone(UTC)
        return owner if 0 < owner.seconds < 86400 else None
    except (ValueError, KeyError, TypeError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _elapsed() -> float:
    """Seconds on a monotonic clock, one that includes time asleep where the system has it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _place() -> str:
    """The scope in which a process number is unique: this boot of the kernel and the PID namespace
    (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()}/{uuid.getnode():x}"


def _birth(pid: int) -> str | None:
    """When a living process began, in clock ticks since the boot; empty for one that has ended, None where unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if stat[0] in "ZX" else stat[19]


def _ended(pid: int, birth: str) -> bool | None:
    """Whether the process that began then has ended; its number may have gone to another. None where unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, and belongs to another user
    now = _birth(pid)
    return None if now is None else now != birth
