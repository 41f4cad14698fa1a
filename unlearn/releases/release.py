"""One release: what is said of it, in release.json and, signed, in its certificate.

release.json        what `Release` lists; its sha256 and those of all files are the subject of the certificate
certificate.json    DSSE envelope of an in-toto statement; its predicate repeats release.json
config.yaml         of the run; ids and subjects of its sets are withheld
metrics.json        measured on these weights
audit.json          where there is one
model/              weights.safetensors and model.json
model.sig           a second signature of model/ alone, where there is one; see model_signature.py
"""

import hashlib
import json
import re
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from unlearn.certificate import Statement
from unlearn.errors import ReleaseError
from unlearn.releases.gate import Verdict

PREDICATE = "urn:unlearn:release:v1"
RECORD, CERTIFICATE = "release.json", "certificate.json"
CONFIG, METRICS, AUDIT = "config.yaml", "metrics.json", "audit.json"
WEIGHTS, CARD = "model/weights.safetensors", "model/model.json"
SIGNATURE = "model.sig"


class _Part(BaseModel):
    # A later version of this program may add a field; one that is there keeps its meaning.
    model_config = ConfigDict(frozen=True, extra="ignore")


class File(_Part):
    """bytes: its size."""

    sha256: str
    bytes: int


class Model(_Part):
    """A model by its weights. version: of the release that holds it, where it is one; uri: where it lay."""

    weights: str
    version: str | None = None
    uri: str | None = None


class Rewritten(_Part):
    """Hashes of the manifest of the training data with the rows that are served, and of the one without them."""

    before: str
    after: str


class Content(NamedTuple):
    """What makes two releases the same model with the same evidence for the same requests."""

    files: tuple[str | None, ...]
    requests: tuple[str, ...]
    withdraws: tuple[str, ...]


class Release(_Part):
    """name: of the run. folder: its name in the store. published: UTC, by the publisher's clock. config_hash: of the
    configuration that the weights were trained with. base: what training started from; parent: the release that was
    current before. data: sha256 of the manifest of each set that was trained on. requests: commitments to the deletion
    requests that are served. withdraws: releases that may not be current any more once this one is. withheld: keys of
    config.yaml whose values are left out. gate: its verdict, where there was one. rewritten: training data without the
    rows that are served, where it was made.
    """

    version: str
    folder: str
    name: str
    software: str
    published: str
    family: str
    weights: str
    config_hash: str
    base: Model | None
    parent: Model | None
    data: dict[str, str]
    requests: list[str]
    withdraws: list[str]
    withheld: list[str]
    gate: Verdict | None
    claimed: list[str]
    not_claimed: list[str]
    files: dict[str, File]
    rewritten: Rewritten | None = None

    @property
    def number(self) -> int:
        return number(self.version)

    @property
    def content(self) -> Content:
        digests = tuple(f.sha256 if (f := self.files.get(n)) else None for n in (WEIGHTS, CONFIG, METRICS, AUDIT))
        return Content(digests, tuple(self.requests), tuple(self.withdraws))

    def to_json(self) -> bytes:
        """What stands in release.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False).encode() + b"\n"

    def statement(self) -> Statement:
        """What its certificate states."""
        data = self.to_json()
        subject = {name: file.sha256 for name, file in self.files.items()} | {RECORD: hashlib.sha256(data).hexdigest()}
        return Statement(subject, PREDICATE, json.loads(data))


def of(statement: Statement, where: str) -> Release:
    """The release that a certificate speaks of. Raises ReleaseError."""
    if statement.predicate_type != PREDICATE:
        raise ReleaseError(
            f"{where}: it states {statement.predicate_type}, and this version reads {PREDICATE} alone: use the "
            "version that wrote it"
        )
    try:
        release = Release.model_validate(statement.predicate)
        number(release.version)
    except (ValidationError, ReleaseError):
        raise ReleaseError(f"{where}: what it states is no release of this program") from None
    return release


def number(version: str) -> int:
    """3 of v3. Raises ReleaseError."""
    if not re.fullmatch(r"v[1-9]\d{0,8}", version):
        raise ReleaseError(f"{version}: a version is written v1, v2, ...; `unlearn release list` names them")
    return int(version[1:])


def described(release: Release) -> dict[str, Any]:
    """The facts that people ask for first, in their order."""
    return {
        "version": release.version, "published": release.published, "run": release.name, "family": release.family,
        "weights": release.weights, "configuration": release.config_hash, "base": release.base and release.base.weights,
        "parent": release.parent and (release.parent.version or release.parent.weights),
        "requests": len(release.requests),
        "withdraws": ", ".join(release.withdraws),
        "gate": "none" if release.gate is None else "passed" if release.gate.passed else "failed",
    }  # fmt: skip
