"""Former names of configuration keys and values, and the former hash: old files, run folders and checkpoints stay
usable."""

import copy
import hashlib
import json
import logging
from typing import Any

from unlearn.registry import METHODS, MODELS

log = logging.getLogger(__name__)

# (part, former key) -> key
KEYS = {
    ("model", "front"): "first_stage",
    ("data", "codes"): "latent_cache",
    ("data", "code_views"): "latent_views",
}
# (part, key) -> former value -> value
VALUES = {("model", "family"): MODELS.aliases, ("method", "name"): METHODS.aliases}
# Former beginnings of the names of tensors, in model folders and checkpoints -> today's.
TENSORS = {"front.": "first_stage."}
# Options that every method had before each declared its own. A method that forgets nothing never looked at them.
SHARED_OPTIONS = {"alpha": 0.25, "noise": "standard", "noise_region": None, "distance": "mse"}


def renamed(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """`tree` with today's names; each former one is told once. `source` names the configuration in messages."""
    tree = copy.deepcopy(tree)
    for (part, former), key in KEYS.items():
        values = tree.get(part)
        if isinstance(values, dict) and former in values and key not in values:
            values[key] = values.pop(former)
            log.warning("%s: %s.%s is now called %s.%s", source, part, former, part, key)
    for (part, key), names in VALUES.items():
        values = tree.get(part)
        if isinstance(values, dict) and values.get(key) in names:
            log.warning("%s: %s.%s %s is now called %s", source, part, key, values[key], names[values[key]])
            values[key] = names[values[key]]
    method = tree.get("method")
    if isinstance(method, dict) and str(method.get("name")).startswith("pretrain"):
        for key in SHARED_OPTIONS.keys() & method.keys():
            log.warning("%s: method.%s is ignored: %s forgets nothing", source, key, method["name"])
            del method[key]
    return tree


def tensor_name(name: str) -> str:
    """Today's name of a tensor."""
    former = next((prefix for prefix in TENSORS if name.startswith(prefix)), None)
    return name if former is None else TENSORS[former] + name.removeprefix(former)


# What the first schema of the hash covered.
_ROWS = ("classes", "exclude_classes", "ids", "subjects", "per_class", "limit")
_TRAINING = (
    "steps", "epochs", "batch_size", "forget_fraction", "lr", "warmup_steps", "schedule", "weight_decay", "betas",
    "clip", "dtype",
    "threads",
)  # fmt: skip


def first_hash(run) -> str:
    """The hash of a RunConfig by the first schema, which checkpoints written before the second one carry."""
    tree = run.model_dump(mode="json")
    data, training, model = tree["data"], tree["training"], tree["model"]
    method = {"name": run.method.name} | run.method.model_dump(
        mode="json", exclude_defaults=True
    )  # a later option: not its default
    former = {today: old for names in VALUES.values() for old, today in names.items()}
    rows = {key: data[key] and {name: data[key][name] for name in _ROWS} for key in ("forget", "retain", "proxy")}
    told = {
        "seed": tree["seed"],
        "model": {"family": former.get(model["family"], model["family"]), "variant": model["variant"],
            "options": model["options"]},
        "data": rows | {
            "codes": run.data.latent_cache is not None, "code_views": data["latent_views"],
            "augment": data["augment"], "shuffle_rows": data["shuffle_rows"],
        },
        "train_views": tree["train_views"],
        "method": SHARED_OPTIONS | method | {"name": former.get(method["name"], method["name"])},
        "training": {key: training[key] for key in _TRAINING} | {"micro_batch_size": run.micro_batch},
    }  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
