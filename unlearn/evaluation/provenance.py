"""Evidence is of the model at hand: what is measured was trained by the configuration that the report will name."""

import logging
from typing import Any

from unlearn import config
from unlearn.aliases import first_hash
from unlearn.config import RunConfig
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.models import weights
from unlearn.run import Run

log = logging.getLogger(__name__)

# What only the evaluation reads, or what says where and how it reads; places are compared by what lies there.
MAY_DIFFER = (
    "name", "run_dir", "cluster", "evaluation", "storage", "training.engine", "model.weights", "model.first_stage",
    "data.train", "data.split",
    "data.proxy_data", "data.proxy_split", "data.cache", "data.cache_bytes", "data.decode_threads", "data.read_ahead",
    "data.max_bad_images",
)  # fmt: skip


def check(run: Run) -> str:
    """The hash of the configuration that the model in the run folder was trained with; that of `run` where there is
    none yet.

    Raises ConfigError where it was trained otherwise than `run` says, with the keys that differ; warns where the data
    has changed since.
    """
    folder = Storage(run.folder)
    if not folder.is_file(f"model/{weights.CARD}"):
        return run.settings.hash()
    card, trained = weights.card(Storage(folder.where("model"))), _trained(folder)
    if changed := _changed(run.settings, trained):
        raise ConfigError(
            f"{run.folder}/model was trained with other settings: {', '.join(changed)}. A measurement is of the model "
            "at hand: leave them as they were (evaluation.* and cluster.* may differ), or train a new run_dir with "
            "them"
        )
    told = card.get("config_hash")
    if told and told not in {
        value for s in (trained or run.settings, run.settings) for value in (s.hash(), first_hash(s))
    }:
        raise ConfigError(
            f"{run.folder}/model was trained with another configuration (hash {str(told)[:12]}, now "
            f"{run.settings.hash()[:12]}), and the config.yaml beside it is not that of the model: evaluate with the "
            "one that it was trained with"
        )
    _check_origin(run, card.get("data"))
    return (trained or run.settings).hash()


def _check_origin(run: Run, data: Any) -> None:
    if not isinstance(data, dict):
        return
    known = {"first_stage" if name == "front" else name: value for name, value in data.items()}
    changed = [name for name, value in run.origin.items() if name in known and known[name] != value]
    if wrong := [f"model.{name}" for name in changed if name in ("weights", "first_stage")]:
        raise ConfigError(
            f"{run.folder}/model started from other weights than {' and '.join(wrong)} names: give those, or nothing "
            "can be said of what unlearning has changed"
        )
    if changed:
        log.warning("the data is not what the model was trained on (%s): it has another hash", ", ".join(changed))


def _trained(folder: Storage) -> RunConfig | None:
    """The configuration that the run has left, if it can still be read."""
    if not folder.is_file("config.yaml"):
        return None
    try:
        return config.read(folder.read("config.yaml").decode(errors="replace"), folder.where("config.yaml"))
    except ConfigError:
        return None


def _changed(settings: RunConfig, trained: RunConfig | None) -> list[str]:
    """Keys that differ, and may not."""
    if trained is None:
        return []
    now, then = (_flat(s.model_dump(mode="json")) for s in (settings, trained))
    keys = [key for key in now | then if now.get(key) != then.get(key)]
    return [key for key in keys if not any(key == free or key.startswith(f"{free}.") for free in MAY_DIFFER)]


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat
