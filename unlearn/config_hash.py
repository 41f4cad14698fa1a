"""The hash of a configuration: what decides the weights, as far as it differs from the defaults."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from unlearn.config import RunConfig

# Raised when the meaning or the default of a key changes; not for a new key with a default.
SCHEMA = 2
# Part -> keys that decide nothing of the weights.
NOT_HASHED: dict[str | None, tuple[str, ...]] = {
    None: ("cluster", "run_dir", "evaluation", "name", "storage"),
    "model": ("weights", "first_stage"),
    "data": ("train", "split", "proxy_data", "proxy_split", "cache", "cache_bytes", "decode_threads", "read_ahead",
        "max_bad_images",
             "latent_cache"),
    "training": ("checkpoint_every", "keep_checkpoints", "log_every", "engine", "zero_stage", "offload_optimizer",
                 "activation_checkpointing"),
}  # fmt: skip


def of(settings: RunConfig, step: int | None = None) -> str:
    """sha256, as text; a new key with a default changes no hash. step: changes of the learning rate from there on are
    left out, since they decide nothing of a checkpoint of that step.

    Where it runs (cluster, run_dir, caches, evaluation) is left out, so a run may go on elsewhere with another number
    of workers; data, files of ids and first weights are told by hashes of their own instead.
    """
    tree = _differences(settings)
    for part, keys in NOT_HASHED.items():
        for key in keys:
            (tree if part is None else tree.get(part, {})).pop(key, None)
    if step is not None and (changes := tree.get("training", {}).pop("lr_changes", None)):
        if past := {at: lr for at, lr in changes.items() if int(at) < step}:
            tree["training"]["lr_changes"] = past
    for rows in tree.get("data", {}).values():
        if isinstance(rows, dict) and "ids_from" in rows:
            rows["ids_from"] = True  # its content counts, by a hash of its own
    tree.setdefault("training", {})["micro_batch_size"] = settings.micro_batch
    tree.setdefault("data", {})["latent_cache"] = settings.data.latent_cache is not None
    content = json.dumps({"schema": SCHEMA, **tree}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _differences(part: BaseModel) -> dict[str, Any]:
    """What differs from the defaults, as plain values; parts that differ in nothing are left out."""
    plain, changed = part.model_dump(mode="json"), {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, BaseModel) and (
            field.is_required() or isinstance(field.get_default(call_default_factory=True), BaseModel)
        ):
            if inner := _differences(value):
                changed[name] = inner
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            changed[name] = plain[name]
    return changed
