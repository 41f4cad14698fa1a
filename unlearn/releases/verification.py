"""Check a release by its folder and a public key alone, offline."""

import logging
from dataclasses import dataclass

from securesystemslib.signer import SSlibKey

from unlearn import certificate, documents
from unlearn.data.storage import Storage
from unlearn.errors import CertificateError, ReleaseError
from unlearn.releases import files
from unlearn.releases import release as releases
from unlearn.releases.release import CERTIFICATE, RECORD, Release

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    """Names of files that are not as the certificate says."""

    changed: list[str]
    added: list[str]
    removed: list[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.added or self.removed)

    def __str__(self) -> str:
        kinds = (("changed", self.changed), ("added", self.added), ("removed", self.removed))
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds if names)


def inspect(folder: str, key: SSlibKey) -> tuple[Release, Findings]:
    """(what was certified, what is not as it was). Raises CertificateError where the signature is not of this key;
    StorageError."""
    storage = Storage(folder)
    there = files.listing(storage)
    if not there.get(CERTIFICATE):
        raise CertificateError(
            f"{storage.uri}: no {CERTIFICATE} there, or it is a link: this is no release, or not a whole one"
        )
    where = storage.where(CERTIFICATE)
    statement = certificate.verify(storage.read(CERTIFICATE), key, where)
    release = releases.of(statement, where)
    expected, names = statement.subject, there.keys() - {CERTIFICATE}
    # What is not a plain file could be another one when it is read again.
    changed = [n for n in sorted(names & expected.keys()) if not there[n] or files.digest(storage, n) != expected[n]]
    found = Findings(changed, sorted(names - expected.keys()), sorted(expected.keys() - names))
    if not found and documents.from_json(storage.read(RECORD)) != statement.predicate:
        raise CertificateError(
            f"{where}: it says something else than {RECORD}, though it is signed: do not trust this publisher"
        )
    return release, found


def verify(folder: str, key: SSlibKey) -> Release:
    """The release in a folder, every file of which is as it was certified. Raises ReleaseError that names those that
    are not."""
    release, found = inspect(folder, key)
    if found:
        raise ReleaseError(f"{Storage(folder).uri} is not {release.version} as it was published. {found}")
    return release
