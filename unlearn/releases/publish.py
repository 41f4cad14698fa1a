"""Publish a run: judge it, copy it to a new folder, certify it."""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from securesystemslib.signer import CryptoSigner

from unlearn import certificate, documents
from unlearn.data.storage import Storage
from unlearn.errors import ReleaseError, StorageError
from unlearn.releases import candidate as candidates
from unlearn.releases import claims, gate, model_signature, pointer, rejection
from unlearn.releases.candidate import Candidate
from unlearn.releases.gate import Gate, Verdict
from unlearn.releases.release import AUDIT, CONFIG, METRICS, RECORD, SIGNATURE, Content, File, Model, Release, Rewritten
from unlearn.releases.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """release: None where the gate has refused the candidate. folder: where it is, released or rejected. new: False
    where this very model had been published already. verdict: None without a gate."""

    release: Release | None
    folder: str
    verdict: Verdict | None
    new: bool = True


def publish(
    run: str, store: Store, signer: CryptoSigner, requests: Sequence[str] = (), rules: Gate | None = None,
    parent: str | None = None, withdraws: Sequence[str] = (), check: Callable[[], None] = lambda: None,
    rewritten: tuple[str, str] | None = None, model_key: str | None = None,
) -> Outcome:  # fmt: skip
    """Make a run folder a release, the next version of a store; the pointer is not moved.

    requests: commitments to the deletion requests that it serves, as the caller's ledger makes them. parent: the
    version that it follows, by default the current one. withdraws: versions that may not be current any more once this
    one is. check: asked before anything is made final; what it raises ends the publishing. model_key: path of the key
    of a second signature, see model_signature.py. A candidate that fails the gate is kept under rejected/ and not
    released. What was published before, the same model with the same evidence for the same requests, is not published
    again. Raises ReleaseError: evidence of another model, a withdrawn release, another publisher that was faster;
    StorageError.
    """
    if model_key:
        model_signature.check(model_key)
    candidate, requests = candidates.read(run), _commitments(requests)
    known, state = store.releases(), pointer.read(store)
    withdraws = sorted({store.release(version).version for version in withdraws})
    if parent and parent not in (release.version for release in known):
        store.release(parent)  # which says what is wrong with it
    content = _content(candidate, requests, withdraws)
    if same := next((release for release in known if release.content == content), None):
        return _again(store, same, state)
    before = _parent(store, parent, state)
    if before and (lost := sorted(set(before.requests) - set(requests))):
        log.warning(
            "%s served %d request(s) that this one does not: it cannot be promoted after it without --force",
            before.version,
            len(lost),
        )
    verdict = gate.judge(rules, (candidate.metrics, candidate.audit), _evidence(store, before)) if rules else None
    if verdict and not verdict.passed:
        return Outcome(None, rejection.keep(store, candidate, content, verdict, before), verdict)

    version = f"v{max((release.number for release in known), default=0) + 1}"
    name = store.attempt(version)
    folder = Storage(store.storage.where(name))
    try:
        listed = candidate.copy_to(folder)
        if model_key:
            data = model_signature.sign(listed, model_key)
            folder.write(SIGNATURE, data)
            listed[SIGNATURE] = File(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        audited, base = candidate.audit is not None, candidate.base
        made_from = next((r.version for r in known if base and r.weights == base.weights), None)
        release = Release(
            version=version, folder=name, name=candidate.name, software=candidate.software,
            published=datetime.now(UTC).isoformat(timespec="seconds"), family=candidate.family,
            weights=candidate.weights,
            config_hash=candidate.config_hash, base=base and base.model_copy(update={"version": made_from}),
            parent=Model(weights=before.weights, version=before.version) if before else None, data=candidate.data,
            rewritten=Rewritten(before=rewritten[0], after=rewritten[1]) if rewritten else None,
            requests=requests, withdraws=withdraws, withheld=candidate.withheld, gate=verdict,
            claimed=claims.claimed(
                version, candidate.weights, candidate.config_hash, base and base.weights, len(requests), audited,
                verdict, rewritten
            ),
            not_claimed=claims.not_claimed(len(requests), audited, verdict), files=listed,
        )  # fmt: skip
        folder.write(RECORD, release.to_json())
        envelope = certificate.sign(release.statement(), signer)
        check()
    except Exception as e:
        store.discard(name)
        # Whoever was faster deletes the files of the slower one.
        if isinstance(e, StorageError) and store.holds(version):
            return _beaten(store, version, content, state)
        raise
    # Where the storage fails in this very request the certificate may be there all the same: the folder is left.
    if not store.commit(release, envelope):
        store.discard(name)
        return _beaten(store, version, content, state)
    store.complete(release)
    return Outcome(release, folder.uri, verdict)


def judge(run: str, store: Store, rules: Gate | None, parent: str | None) -> tuple[Verdict | None, str]:
    """(what the gate says of a run folder beside a release, as `publish` would ask it; sha256 of the weights). Raises
    as `publish`."""
    candidate = candidates.read(run)
    before = _evidence(store, store.release(parent) if parent else None)
    return gate.judge(rules, (candidate.metrics, candidate.audit), before) if rules else None, candidate.weights


def _beaten(store: Store, version: str, content: Content, state: pointer.State) -> Outcome:
    """What comes of it where somebody else has published this version meanwhile."""
    winner = store.release(version)
    if winner.content == content:
        return _again(store, winner, state)
    raise ReleaseError(
        f"{version} was published meanwhile by somebody else: publish again, so that the gate compares with it"
    )


def _again(store: Store, release: Release, state: pointer.State) -> Outcome:
    if release.version in state.withdrawn:
        raise ReleaseError(
            f"this model is {release.version}, which was withdrawn: {state.withdrawn[release.version].reason}"
        )
    store.complete(release)
    return Outcome(release, store.folder(release).uri, release.gate, new=False)


def _commitments(given: Sequence[str]) -> list[str]:
    if wrong := [text for text in given if not re.fullmatch(r"[!-~]{1,256}", text)]:
        raise ReleaseError(f"{wrong[0][:40]!r}: a commitment is one word of at most 256 characters, as a sha256 in hex")
    return sorted(set(given))


def _content(candidate: Candidate, requests: list[str], withdraws: list[str]) -> Content:
    digests = [candidate.documents[n] if n in candidate.documents else None for n in (CONFIG, METRICS, AUDIT)]
    hashed = [None if data is None else hashlib.sha256(data).hexdigest() for data in digests]
    return Content((candidate.weights, *hashed), tuple(requests), tuple(withdraws))


def _parent(store: Store, version: str | None, state: pointer.State) -> Release | None:
    version = version or state.version
    if version in state.withdrawn:
        raise ReleaseError(f"{version} was withdrawn: name another release as parent")
    return store.release(version) if version else None


def _evidence(store: Store, release: Release | None) -> gate.Documents | None:
    """metrics.json and audit.json of a release, which must be those that were published."""
    if release is None:
        return None
    folder, read = store.folder(release), {}
    for name in (METRICS, AUDIT):
        if name in release.files:
            read[name] = folder.read(name)
            if hashlib.sha256(read[name]).hexdigest() != release.files[name].sha256:
                raise ReleaseError(
                    f"{folder.where(name)} was changed after {release.version} was published: restore it"
                )
    return documents.from_json(read[METRICS]), documents.from_json(read[AUDIT]) if AUDIT in read else None
