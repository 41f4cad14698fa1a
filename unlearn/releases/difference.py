"""What differs between two releases."""

from typing import Any

from unlearn import documents
from unlearn.data.storage import Storage
from unlearn.releases import figures
from unlearn.releases.release import AUDIT, CONFIG, METRICS, Release
from unlearn.releases.store import Store


def of(store: Store, old: Release, new: Release) -> dict[str, Any]:
    """{"release": {name: [old, new]}, "requests": {"added", "removed"}, "config": {key: [old, new]}, "figures": {name:
    [old, new]}, "measured otherwise": {what: [old, new]}}, each with what differs alone. Raises StorageError."""
    folders = [store.folder(release) for release in (old, new)]
    settings = [_flat(documents.from_yaml(folder.read(CONFIG).decode())) for folder in folders]
    metrics = [documents.from_json(folder.read(METRICS)) for folder in folders]
    audits = [_audit(folder) for folder in folders]
    told = ("weights", "config_hash", "family", "software", "data", "base", "parent", "withdraws")
    return {
        "release": _changed(*({key: r.model_dump(mode="json")[key] for key in told} for r in (old, new))),
        "requests": {
            "added": sorted(set(new.requests) - set(old.requests)),
            "removed": sorted(set(old.requests) - set(new.requests)),
        },
        "config": _changed(*settings),
        "figures": _changed(*(figures.flat(m, a) for m, a in zip(metrics, audits, strict=True))),
        "measured otherwise": _changed(*map(figures.conventions, metrics)),
    }


def _audit(folder: Storage) -> dict[str, Any] | None:
    return documents.from_json(folder.read(AUDIT)) if folder.is_file(AUDIT) else None


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    names = [*old, *(name for name in new if name not in old)]
    return {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat
