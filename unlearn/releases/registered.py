"""What a registry of models is told of a release: where its model is, and how to check it. No request and no person is
named, and the model is not copied."""

import hashlib

from unlearn.errors import ReleaseError
from unlearn.releases import pointer
from unlearn.releases.release import Release
from unlearn.releases.store import Store


def ready(store: Store, version: str) -> Release:
    """A release that can be registered. Raises ReleaseError where there is none, or it was withdrawn."""
    release = store.release(version)
    if withdrawn := pointer.read(store).withdrawn.get(version):
        raise ReleaseError(f"{version} was withdrawn, and is not pushed: {withdrawn.reason}")
    store.complete(release)
    return release


def location(store: Store, release: Release) -> str:
    """URI of its model folder."""
    uri = store.folder(release).where("model")
    return uri if "://" in uri else f"file://{uri}"


def facts(store: Store, release: Release) -> dict[str, str]:
    """What a reader of the registry can hold against the release."""
    return {
        "weights_sha256": release.weights, "certificate_sha256": hashlib.sha256(store.certificate(release)).hexdigest(),
        "family": release.family, "config_hash": release.config_hash, "published": release.published,
        "software": release.software, "gate": "passed" if release.gate else "none",
        "requests_served": str(len(release.requests)), "release": store.folder(release).uri,
    }  # fmt: skip
