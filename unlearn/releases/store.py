"""Where the releases of one model lie, here or on S3.

    current.json            the pointer: which release is current (see pointer.py)
    certificates/v3.json    creating it is what makes the release; it exists once, whoever publishes beside
    v3-5f2a9c01/            the release, never changed; it holds a copy of its certificate
    rejected/1c0d.../       candidates that the gate has refused

Files are uploaded to a folder whose name nobody else has, and the certificate comes last. A publisher that is killed
leaves a folder without a certificate, which is no release; the next one deletes it.
"""

import contextlib
import re
import uuid
from concurrent.futures import ThreadPoolExecutor

from unlearn import certificate
from unlearn.data.storage import Storage
from unlearn.errors import ReleaseError, StorageError
from unlearn.releases import files
from unlearn.releases import release as releases
from unlearn.releases.release import CERTIFICATE, Release

CERTIFICATES, REJECTED = "certificates", "rejected"
READERS = 16  # certificates that are read at once


class Store:
    """The releases of one model, by URI."""

    def __init__(self, uri: str):
        self.storage = Storage(uri)

    def check(self) -> None:
        """Raises ReleaseError where there is nothing at all."""
        if not self.storage.files(CERTIFICATES) and not self.storage.files():
            raise ReleaseError(f"{self.storage.uri}: there is no such store, nothing was ever published there")

    def releases(self) -> list[Release]:
        """All of them, the first one first; signatures are not checked. Raises StorageError, CertificateError,
        ReleaseError."""
        names = (re.fullmatch(rf"{CERTIFICATES}/(v\d+)\.json", name) for name in self.storage.files(CERTIFICATES))
        versions = sorted((name[1] for name in names if name), key=releases.number)
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self._read, versions))

    def release(self, version: str) -> Release:
        """Raises ReleaseError where there is no such one."""
        releases.number(version)
        if not self.holds(version):
            raise ReleaseError(
                f"{self.storage.uri} has no release {version}: `unlearn release list` names those there are"
            )
        return self._read(version)

    def holds(self, version: str) -> bool:
        """Whether there is such a release by now."""
        return self.storage.is_file(_certificate(version))

    def folder(self, release: Release) -> Storage:
        """Where its files are."""
        return Storage(self.storage.where(release.folder))

    def attempt(self, version: str) -> str:
        """The name of a new folder for files that may become this version."""
        return f"{version}-{uuid.uuid4().hex[:8]}"

    def commit(self, release: Release, envelope: bytes) -> bool:
        """Make it a release; False where its version exists by now. Exactly one of many concurrent publishers
        succeeds."""
        return self.storage.create(_certificate(release.version), envelope)

    def complete(self, release: Release) -> None:
        """Copy the certificate into the folder, where a publisher was killed before it did, and delete what was never
        completed."""
        folder = self.folder(release)
        if not folder.is_file(CERTIFICATE):
            try:
                folder.write(CERTIFICATE, self.certificate(release))
            except StorageError:
                # Somebody else completes it too, and has deleted the half of a copy.
                if not folder.is_file(CERTIFICATE):
                    raise
        with contextlib.suppress(StorageError):  # others delete too; what is left the next publisher deletes
            for name in files.listing(folder):
                if name.startswith(f".{CERTIFICATE}.") and name.endswith(".part"):
                    folder.delete(name)
            self._sweep()

    def certificate(self, release: Release) -> bytes:
        """The envelope as it was committed."""
        return self.storage.read(_certificate(release.version))

    def discard(self, folder: str) -> None:
        """Delete the folder of an attempt, as far as it can be: others may be at it, and the next publisher deletes the
        rest."""
        for _ in range(3):
            with contextlib.suppress(StorageError):
                self.storage.delete(folder)
                return

    def _sweep(self) -> None:
        """Delete folders of versions that are taken by another one: whoever still writes there can publish it no
        more."""
        attempts: dict[str, set[str]] = {}
        for name in files.listing(self.storage):  # also of folders that hold nothing but half a file
            if attempt := re.match(r"(v\d+)-[0-9a-f]{8}(?=/)", name):
                attempts.setdefault(attempt[1], set()).add(attempt[0])
        for version, folders in attempts.items():
            if len(folders) > 1 and self.holds(version):
                for folder in folders - {self._read(version).folder}:
                    self.discard(folder)

    def _read(self, version: str) -> Release:
        name = _certificate(version)
        where = self.storage.where(name)
        release = releases.of(certificate.read(self.storage.read(name), where)[0], where)
        if release.version != version or not re.fullmatch(rf"{version}-[0-9a-f]{{8}}", release.folder):
            raise ReleaseError(
                f"{where} speaks of {release.version} in {release.folder}: certificates were exchanged, or renamed"
            )
        return release


def _certificate(version: str) -> str:
    return f"{CERTIFICATES}/{version}.json"
