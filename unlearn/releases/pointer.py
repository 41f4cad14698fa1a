"""The pointer: which release is current, which are withdrawn, and how it came to that.

All of it is in current.json and changes by compare-and-swap, so of two changes at once the second one sees the first.
"""

import getpass
import hashlib
import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from unlearn import certificate, documents
from unlearn.errors import ReleaseError
from unlearn.releases import files, lineage
from unlearn.releases.release import CERTIFICATE, Release
from unlearn.releases.store import Store

CURRENT = "current.json"
ATTEMPTS = 50  # to change the pointer while others do


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Withdrawal(_Part):
    """by_release: the release that replaced it, where it was withdrawn by that one's promotion."""

    at: str
    by: str
    reason: str
    by_release: str | None = None


class Move(_Part):
    """One change. before: the version that was current; after: the one that is now, None where none is. remembered: how
    many requests that others have served the model remembers, where that was forced."""

    action: Literal["promote", "rollback", "withdraw"]
    at: str
    by: str
    before: str | None
    after: str | None
    reason: str = ""
    forced: bool = False
    remembered: int = 0


class State(_Part):
    """version, folder, weights: of the current release, null where there is none. history: every change, the first one
    first."""

    version: str | None = None
    folder: str | None = None
    weights: str | None = None
    withdrawn: dict[str, Withdrawal] = {}
    history: list[Move] = []

    @property
    def served(self) -> set[str]:
        """Versions that are or once were current."""
        return {move.after for move in self.history if move.after}

    @property
    def line(self) -> list[str]:
        """The releases that led to the current one; what was gone back from is not among them."""
        line: list[str] = []
        for move in self.history:
            if move.action == "rollback" and move.after in line:
                del line[line.index(move.after) + 1 :]
            elif move.action != "withdraw" and move.after:
                line.append(move.after)
        return line


def read(store: Store) -> State:
    """Raises ReleaseError where current.json is damaged."""
    found = store.storage.read_version(CURRENT)
    return _state(store, found[0]) if found else State()


def promote(store: Store, version: str, reason: str = "", force: bool = False, by: str | None = None) -> State:
    """Make a release current. Raises ReleaseError: it is withdrawn; it remembers what others have forgotten, unless
    forced."""
    return _move(store, "promote", lambda state: version, reason, force, by)


def rollback(
    store: Store, version: str | None = None, reason: str = "", force: bool = False, by: str | None = None
) -> State:
    """Go back to a release that was current once, by default to the last one before that may be so again. Raises as
    `promote`."""

    def target(state: State) -> str:
        if version is not None:
            if version == state.version:
                raise ReleaseError(f"{version} is current: there is nothing to go back to")
            if version not in state.served:
                raise ReleaseError(f"{version} was never current: `unlearn release promote` moves on")
            return version
        past = (each for each in reversed(state.line) if each != state.version and each not in state.withdrawn)
        if found := next(past, None):
            return found
        raise ReleaseError(
            "no earlier release can be gone back to: none was current before, or all of them are withdrawn"
        )

    return _move(store, "rollback", target, reason, force, by)


def withdraw(
    store: Store, version: str, reason: str, force: bool = False, by: str | None = None
) -> tuple[State, list[lineage.Descendant]]:
    """Say that a release may not be current any more; the state, and the releases that came from it, which are left as
    they are.

    force: though it is current; then none is. Raises ReleaseError where it is withdrawn, or current and not forced.
    """
    release = store.release(version)
    if not reason.strip():
        raise ReleaseError("a withdrawal wants its reason: --reason TEXT")

    def update(state: State) -> State:
        if version in state.withdrawn:
            raise ReleaseError(f"{version} is withdrawn already: {state.withdrawn[version].reason}")
        if state.version == version and not force:
            raise ReleaseError(
                f"{version} is current: promote another release or roll back first, or give --force, after which no "
                "release is current"
            )
        withdrawal = Withdrawal(at=_now(), by=by or _user(), reason=reason)
        changes: dict = {"withdrawn": state.withdrawn | {version: withdrawal}}
        if state.version == version:
            changes |= {"version": None, "folder": None, "weights": None}
        move = Move(action="withdraw", at=withdrawal.at, by=withdrawal.by, before=state.version,
                    after=None if state.version == version else state.version, reason=f"{version}: {reason}",
                    forced=force)  # fmt: skip
        return state.model_copy(update=changes | {"history": [*state.history, move]})

    return _change(store, update), lineage.descendants(release, store.releases())


def remembered(known: Iterable[Release], state: State, requests: Iterable[str]) -> dict[str, list[str]]:
    """{commitment: versions} for which a release that serves `requests` cannot become current."""
    return lineage.remembered(
        requests, (r for r in known if r.version in state.served or r.version not in state.withdrawn)
    )


def served(store: Store, state: State) -> tuple[set[str], dict[str, list[str]]]:
    """(commitments that the current release serves, {commitment: versions that serve it and are not withdrawn} of all
    others that any release serves)."""
    known = store.releases()
    own = {request for release in known if release.version == state.version for request in release.requests}
    others: dict[str, list[str]] = {}
    for release in known:
        for request in set(release.requests) - own:
            others.setdefault(request, [])
            others[request] += [release.version] if release.version not in state.withdrawn else []
    return own, others


def _move(
    store: Store, action: Literal["promote", "rollback"], target: Callable[[State], str], reason: str, force: bool,
    by: str | None
) -> State:  # fmt: skip
    if force and not reason.strip():
        raise ReleaseError("--force wants its reason, which is recorded: --reason TEXT")
    known = {release.version: release for release in store.releases()}
    whole: set[str] = set()  # what was read is not read again where others change the pointer meanwhile

    def update(state: State) -> State:
        version = target(state)
        release = known.get(version) or store.release(version)
        if version == state.version:
            return state
        if version in state.withdrawn:
            raise ReleaseError(f"{version} was withdrawn, and cannot be current: {state.withdrawn[version].reason}")
        lost = remembered(known.values(), state, release.requests)
        if lost and not force:
            by_others = ", ".join(sorted({v for versions in lost.values() for v in versions}))
            raise ReleaseError(
                f"{version} remembers what {by_others} has forgotten: {len(lost)} request(s) would be served no more. "
                "Promote a release that serves them, or give --force and --reason, which are recorded"
            )
        if version not in whole:
            _check_whole(store, release)
            whole.add(version)
        move = Move(action=action, at=_now(), by=by or _user(), before=state.version, after=version, reason=reason,
                    forced=bool(lost), remembered=len(lost))  # fmt: skip
        withdrawal = Withdrawal(at=move.at, by=move.by, reason=f"replaced by {version}", by_release=version)
        withdrawn = {each: withdrawal for each in release.withdraws if each not in state.withdrawn}
        return State(version=version, folder=release.folder, weights=release.weights,
                     withdrawn=state.withdrawn | withdrawn, history=[*state.history, move])  # fmt: skip

    return _change(store, update)


def _check_whole(store: Store, release: Release) -> None:
    """Its files are there, and as they were certified: each is read. The signature needs a key: `unlearn release
    verify`."""
    store.complete(release)
    folder, envelope = store.folder(release), store.certificate(release)
    expected = certificate.read(envelope, folder.where(CERTIFICATE))[0].subject
    expected |= {CERTIFICATE: hashlib.sha256(envelope).hexdigest()}
    there = set(folder.files())
    if missing := sorted(expected.keys() - there):
        raise ReleaseError(f"{folder.uri} lacks {', '.join(missing)}: restore the release before it is current")
    if changed := [name for name in sorted(expected) if files.digest(folder, name) != expected[name]]:
        raise ReleaseError(
            f"{folder.uri} is not {release.version} as it was published: {', '.join(changed)} changed since. Restore "
            "the release before it is current, or withdraw it"
        )


def _change(store: Store, update: Callable[[State], State]) -> State:
    for _ in range(ATTEMPTS):
        found = store.storage.read_version(CURRENT)
        before = _state(store, found[0]) if found else State()
        after = update(before)
        if after == before:
            return after
        data = json.dumps(after.model_dump(mode="json"), indent=1).encode() + b"\n"
        if store.storage.replace(CURRENT, data, found[1]) if found else store.storage.create(CURRENT, data):
            return after
    raise ReleaseError(f"{store.storage.where(CURRENT)}: others change it all the time: try again")


def _state(store: Store, data: bytes) -> State:
    try:
        return State.model_validate(documents.from_json(data))
    except (ValueError, ValidationError):
        raise ReleaseError(
            f"{store.storage.where(CURRENT)} is damaged: put it back from a backup, or delete it and promote a "
            "release again"
        ) from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name, as in many containers
        return "unknown"
