"""Load and save weights: our folders (weights.safetensors + model.json) and public checkpoints (.pth, .safetensors).

Nothing is unpickled: .pth files are read with weights_only=True.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from unlearn import config
from unlearn.data.storage import Storage, local_copy
from unlearn.errors import WeightsError
from unlearn.models import base

WEIGHTS, CARD = "weights.safetensors", "model.json"


def build(model: config.Model, seed: int = 0) -> base.Adapter:
    """The model that a config names, on CPU in float32, in eval mode; without weights it is initialised from `seed`."""
    tensors, card = read(model.weights) if model.weights else ({}, {})
    if card.get("family", model.family) != model.family:
        raise WeightsError(f"{model.weights} holds a model of family {card['family']}, the config says {model.family}")
    cls, options = base.adapter(model.family), base.options(model, card.get("options"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = cls(options)
    if model.weights:
        fill(built, cls.from_public(tensors), model.weights)
    return built.eval()


def fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copy `tensors` into `module`. Raises WeightsError that names every tensor missing, extra or misshapen."""
    own = module.state_dict()
    wrong = [f"missing {n}" for n in own if n not in tensors]
    wrong += [f"unexpected {n}" for n in tensors if n not in own]
    wrong += [
        f"{n} has shape {tuple(tensors[n].shape)}, the model wants {tuple(t.shape)}"
        for n, t in own.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise WeightsError(
            f"{source} does not fit the model: {'; '.join(wrong[:12])}{more}. Give the model.variant or model.options of these weights."
        )
    module.load_state_dict(tensors)


def read(uri: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, card) of a folder of ours or of one file; the card is empty where there is none."""
    storage, card = Storage(uri), {}
    if not storage.is_file():
        if not storage.is_file(CARD):
            raise WeightsError(f"no weights at {uri}: give a .safetensors or .pth file, or a folder with {WEIGHTS} and {CARD}")
        try:
            card = json.loads(storage.read(CARD))
            dict(card["options"], family=card["family"])
        except (ValueError, KeyError, TypeError):
            raise WeightsError(f"{storage.where(CARD)} is damaged: export the model again") from None
        uri = f"{uri.rstrip('/')}/{WEIGHTS}"
    with local_copy(uri) as path:
        return _tensors(path, uri), card


def _tensors(path: Path, uri: str) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Public training checkpoints keep their argparse options beside the weights: plain data, allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle fails in any way there is
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise WeightsError(f"{uri} cannot be read as weights (safe formats only): {why}") from None
    for key in ("model", "state_dict"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise WeightsError(f"{uri} holds no dictionary of tensors")
    return tensors


def fingerprint(uri: str) -> str:
    """sha256 of the file of weights at `uri`."""
    storage = Storage(uri)
    with local_copy(uri if storage.is_file() else storage.where(WEIGHTS)) as path, open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(model: base.Adapter, uri: str, card: dict[str, Any]) -> None:
    """Write the model as a folder of ours; `card` adds to what the folder says of itself (where it comes from)."""
    tensors = {name: t.detach().float().contiguous() for name, t in model.state_dict().items()}
    storage = Storage(uri)
    storage.write(WEIGHTS, save(tensors))
    card = {"family": model.family, "options": model.options.model_dump(mode="json"), **card}
    # The card is written last: a folder without it is not a model.
    storage.write(CARD, json.dumps(card, indent=2).encode())
