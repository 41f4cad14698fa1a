"""What a run folder offers for release: a model, and evidence that is of this model."""

import hashlib
from dataclasses import dataclass
from typing import Any

import yaml

from unlearn import config, documents
from unlearn.aliases import first_hash
from unlearn.config import RunConfig
from unlearn.data.storage import Storage
from unlearn.errors import ReleaseError
from unlearn.models import weights
from unlearn.releases import files
from unlearn.releases.release import AUDIT, CARD, CONFIG, METRICS, WEIGHTS, File, Model

_SETS, _NAMES = ("forget", "retain", "proxy"), ("ids", "subjects")


@dataclass(frozen=True)
class Candidate:
    """model: the folder of the weights. weights: their sha256, which is checked when they are copied. documents: what
    small files of the release hold. withheld, config_hash, base, data: as in a Release."""

    model: Storage
    weights: str
    name: str
    software: str
    family: str
    config_hash: str
    base: Model | None
    data: dict[str, str]
    documents: dict[str, bytes]
    withheld: list[str]
    metrics: dict[str, Any]
    audit: dict[str, Any] | None

    def copy_to(self, folder: Storage) -> dict[str, File]:
        """Write its files to a folder; what was written. Raises ReleaseError where the weights are not those that were
        measured."""
        digest, size = files.copy(self.model, weights.WEIGHTS, folder, WEIGHTS)
        if digest != self.weights:
            raise ReleaseError(
                f"{self.model.where(weights.WEIGHTS)} is not the file that model.json and metrics.json speak of: it "
                "was changed or is damaged; export the model again"
            )
        listed = {WEIGHTS: File(sha256=digest, bytes=size)}
        for name, data in self.documents.items():
            folder.write(name, data)
            listed[name] = File(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        return dict(sorted(listed.items()))


def read(run: str) -> Candidate:
    """The candidate of a run folder. Raises ReleaseError where its parts are not of one model; ConfigError,
    StorageError, WeightsError."""
    folder = Storage(run)
    if not folder.is_file("model/" + weights.CARD):
        raise ReleaseError(f"{folder.uri}: no trained model there: give the folder of a finished run (`unlearn run`)")
    for name, command in ((CONFIG, "run"), (METRICS, "evaluate")):
        if not folder.is_file(name):
            raise ReleaseError(
                f"{folder.uri}: no {name} there, so nothing is known of the model: `unlearn {command} {run}`"
            )
    written = folder.read(CONFIG)
    settings = config.read(written.decode(errors="replace"), folder.where(CONFIG))
    kept = {METRICS: folder.read(METRICS)}
    metrics = _json(kept[METRICS], folder.where(METRICS))
    measured = _measured(metrics)
    model, card = _model(folder, measured, run)
    _check_configuration(settings, card, metrics, folder, run)
    audit = None
    if folder.is_file(AUDIT):
        kept[AUDIT] = folder.read(AUDIT)
        audit = _json(kept[AUDIT], folder.where(AUDIT))
        if _measured(audit) != measured:
            raise ReleaseError(f"{folder.where(AUDIT)}: it is not of the weights in {model.uri}: audit the run again")
    kept[CONFIG], withheld = _public(written, settings)
    kept[CARD] = model.read(weights.CARD)
    data = dict(card.get("data") or {})
    origin = data.pop("weights", None)
    return Candidate(
        model=model, weights=card["sha256"], name=settings.name, software=str(card.get("software", "")),
        family=card["family"],
        config_hash=settings.hash(), base=Model(weights=origin, uri=card.get("from")) if origin else None,
        data={str(name): str(value) for name, value in data.items()}, documents=kept, withheld=withheld,
        metrics=metrics, audit=audit,
    )  # fmt: skip


def _measured(document: dict[str, Any]) -> str | None:
    """sha256 of the unlearned weights that figures are of."""
    known = document.get("weights")
    return known.get("unlearned") if isinstance(known, dict) else None


def _model(folder: Storage, measured: str | None, run: str) -> tuple[Storage, dict[str, Any]]:
    """The model that was measured, of those of a run: the weights, or their moving average."""
    for name in ("model", "model_ema"):
        if folder.is_file(f"{name}/{weights.CARD}"):
            card = weights.card(Storage(folder.where(name)))
            if measured is not None and card.get("sha256") == measured:
                return Storage(folder.where(name)), card
    raise ReleaseError(
        f"{folder.where(METRICS)}: the figures are of other weights than those in {folder.where('model')}: `unlearn "
        f"evaluate {run}`"
    )


def _check_configuration(
    settings: RunConfig, card: dict[str, Any], metrics: dict[str, Any], folder: Storage, run: str
) -> None:
    known = {settings.hash(), first_hash(settings)}
    if card.get("config_hash") not in known:
        raise ReleaseError(
            f"{folder.where(CONFIG)} is not the configuration that the model was trained with (hash "
            f"{settings.hash()[:12]}, the model says {str(card.get('config_hash'))[:12]}): restore it, or train anew"
        )
    if metrics.get("config_hash") not in known:
        raise ReleaseError(
            f"{folder.where(METRICS)}: it was measured under another configuration: `unlearn evaluate {run}`"
        )


def _public(data: bytes, settings: RunConfig) -> tuple[bytes, list[str]]:
    """(config.yaml as it may be shown, the keys whose values are left out): a release names no person and no image."""
    if not settings.names_rows:
        return data, []
    tree, withheld = settings.model_dump(mode="json"), []
    for name in _SETS:
        for key in _NAMES:
            rows = tree["data"].get(name) or {}
            if rows.get(key):
                rows[key] = [f"({len(rows[key])} withheld)"]
                withheld.append(f"data.{name}.{key}")
    return yaml.safe_dump(tree, sort_keys=False).encode(), withheld


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        tree = documents.from_json(data)
        if isinstance(tree, dict):
            return tree
    except ValueError:
        pass
    raise ReleaseError(f"{where} is damaged: it holds no JSON object")
