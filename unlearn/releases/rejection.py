"""Candidates that the gate has refused: kept apart from the releases, with the reasons."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import rfc8785

from unlearn import documents
from unlearn.data.storage import Storage
from unlearn.releases.candidate import Candidate
from unlearn.releases.gate import Verdict
from unlearn.releases.release import Content, Release
from unlearn.releases.store import REJECTED, Store

CANDIDATE = "candidate.json"


def keep(store: Store, candidate: Candidate, content: Content, verdict: Verdict, before: Release | None) -> str:
    """Keep a candidate that failed, with the reasons; its folder. The same candidate with the same verdict lies there
    once."""
    about: dict[str, Any] = {
        "name": candidate.name, "weights": candidate.weights, "config_hash": candidate.config_hash,
        "base": candidate.base and candidate.base.model_dump(), "parent": before and before.version,
        "data": candidate.data,
        "requests": list(content.requests), "withdraws": list(content.withdraws),
        "gate": verdict.model_dump(mode="json"),
    }  # fmt: skip
    name = hashlib.sha256(rfc8785.dumps(about)).hexdigest()[:16]
    folder = Storage(store.storage.where(f"{REJECTED}/{name}"))
    if not folder.is_file(CANDIDATE):  # written last: a folder without it was not completed
        about["rejected"] = datetime.now(UTC).isoformat(timespec="seconds")
        about["files"] = {file: facts.model_dump() for file, facts in candidate.copy_to(folder).items()}
        folder.write(CANDIDATE, json.dumps(about, indent=1, allow_nan=False).encode() + b"\n")
    return folder.uri


def kept(store: Store) -> list[dict[str, Any]]:
    """What candidate.json says of every candidate that was refused, with its `folder`, the first one first."""
    names = [name for name in store.storage.files(REJECTED) if name.endswith(f"/{CANDIDATE}")]
    found = [
        documents.from_json(store.storage.read(name)) | {"folder": store.storage.where(name.rpartition("/")[0])}
        for name in names
    ]
    return sorted(found, key=lambda about: str(about.get("rejected")))
