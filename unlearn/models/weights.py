"""Load and save weights: our folders (weights.safetensors + model.json), public checkpoints (.pth, .safetensors), and the
folders of other libraries (diffusers, transformers).

Nothing is unpickled: .pth files are read with weights_only=True.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from unlearn import config
from unlearn.data.storage import Storage, local_copy, local_folder
from unlearn.errors import WeightsError
from unlearn.models import base

WEIGHTS, CARD = "weights.safetensors", "model.json"
# What tells a folder of diffusers or transformers.
FOREIGN = ("model_index.json", "config.json")


def build(model: config.Model, seed: int = 0) -> base.Adapter:
    """The model that a config names, on CPU in float32, in eval mode; without weights it is initialised from `seed`."""
    cls = base.adapter(model.family)
    tensors, found = start(cls, model) if model.weights else ({}, None)
    options = base.options(model, found)
    tensors = cls.placed(tensors, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = cls(options)
    if model.first_stage:
        if built.first_stage is None:
            raise WeightsError(f"model.first_stage: this {model.family} has no frozen first stage")
        with local_folder(model.first_stage) as path:
            first_stage = cls.first_stage_from(path)
        rest = {n: t for n, t in built.state_dict().items() if not n.startswith(cls.first_stage_names)}
        fill(built, rest | first_stage, model.first_stage)
        tensors = tensors | first_stage if model.weights else {}
    if model.weights:
        if built.first_stage is not None and not any(n.startswith("first_stage.") for n in tensors):
            raise WeightsError(f"{model.weights} lacks the frozen first stage of {model.family}: name its weights in model.first_stage")
        fill(built, tensors, model.weights)
    return built.eval()


def start(cls: type[base.Adapter], model: config.Model) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """(tensors in our names, the options found beside them or None)."""
    uri = model.weights
    assert uri is not None, "without weights there is nothing to load"
    storage = Storage(uri)
    if not storage.is_file() and not storage.is_file(CARD) and any(storage.is_file(name) for name in FOREIGN):
        with local_folder(uri) as folder:
            return cls.from_folder(folder, dict(model.options))
    tensors, card = read(uri)
    if card.get("family", cls.family) != cls.family:
        raise WeightsError(f"{uri} holds a model of family {card['family']}, the config says {cls.family}")
    return cls.from_public(tensors), card.get("options")


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
    storage, about = Storage(uri), {}
    if not storage.is_file():
        if not storage.is_file(CARD):
            raise WeightsError(f"no weights at {uri}: give a .safetensors or .pth file, or a folder with {WEIGHTS} and {CARD}")
        about = card(storage)
        uri = f"{uri.rstrip('/')}/{WEIGHTS}"
    with local_copy(uri) as path:
        return tensors(path, uri), about


def card(storage: Storage) -> dict[str, Any]:
    """What a folder of ours says of itself: {"family", "options", ...}. Raises WeightsError."""
    try:
        found = json.loads(storage.read(CARD))
        dict(found["options"], family=found["family"])
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{storage.where(CARD)} is damaged: export the model again") from None
    return found


def tensors(path: Path, uri: str) -> dict[str, torch.Tensor]:
    """The tensors of one local file of weights; `uri` names it in messages. Raises WeightsError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Public training checkpoints keep their argparse options beside the weights: plain data, allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle fails in any way there is
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise WeightsError(f"{uri} cannot be read as weights (safe formats only): {why}") from None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise WeightsError(f"{uri} holds no dictionary of tensors")
    return found


def fingerprint(uri: str) -> str:
    """sha256 of the file of weights at `uri`, or of all files of a folder of another library."""
    storage = Storage(uri)
    if not storage.is_file() and not storage.is_file(WEIGHTS):
        digest = hashlib.sha256()
        for name in storage.files():
            digest.update(name.encode() + hashlib.sha256(storage.read(name)).digest())
        return digest.hexdigest()
    with local_copy(uri if storage.is_file() else storage.where(WEIGHTS)) as path, open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(model: config.Model, uri: str) -> None:
    """Write a model to a new folder in the form that the libraries it comes from read (diffusers, transformers)."""
    target = Storage(uri)
    if target.is_file() or target.files():
        raise WeightsError(f"{uri} is not empty: give a new folder")
    built = build(model)
    with tempfile.TemporaryDirectory() as folder:
        built.to_folder(Path(folder))
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            target.upload(path, path.relative_to(folder).as_posix())


def family(uri: str) -> str:
    """The family of a folder of ours. Raises WeightsError for other weights, which do not say it."""
    storage = Storage(uri)
    if not storage.is_file(CARD):
        raise WeightsError(f"{uri} does not say its family: name it with --family")
    return read(uri)[1]["family"]


def write(model: base.Adapter, uri: str, card: dict[str, Any]) -> None:
    """Write the model as a folder of ours; `card` adds to what the folder says of itself (where it comes from)."""
    held = {name: (t.detach().float() if t.is_floating_point() else t).contiguous() for name, t in model.state_dict().items()}
    storage = Storage(uri)
    storage.write(WEIGHTS, save(held))
    card = {"family": model.family, "options": model.options.model_dump(mode="json"), **card}
    # The card is written last: a folder without it is not a model.
    storage.write(CARD, json.dumps(card, indent=2).encode())
