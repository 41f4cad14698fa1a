"""Folders as diffusers' save_pretrained writes them: their configs and tensors, read without unpickling."""

import json
from pathlib import Path
from typing import Any

import torch

from unlearn.errors import WeightsError
from unlearn.models import tensor_files

FILE = "diffusion_pytorch_model"
# What transformers calls its files: in safetensors, and before.
TRANSFORMERS = ("model", "pytorch_model")
# Names of attention in files written before diffusers 0.15.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def config(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing: give a whole folder as diffusers' save_pretrained writes it") from None
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is damaged: it holds no JSON object")
    return content


def public(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers config without its metadata."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def tensors(folder: Path, stems: tuple[str, str] = (FILE, FILE)) -> dict[str, torch.Tensor]:
    """The tensors of one model's folder: safetensors, whole or in parts, also of fp16 alone, or a .bin. Raises
    WeightsError.

    stems: how the names of its files begin, in safetensors and as .bin.
    """
    names, (safe, pickled) = [], stems
    for stem, variant, suffix in (
        (safe, "", "safetensors"), (safe, ".fp16", "safetensors"), (pickled, "", "bin"), (pickled, ".fp16", "bin"),
    ):  # fmt: skip
        name, index = f"{stem}{variant}.{suffix}", folder / f"{stem}.{suffix}.index{variant}.json"
        if (folder / name).is_file():
            names = [name]
        elif index.is_file():
            names = sorted(set(config(index).get("weight_map", {}).values()))
        if names:
            break
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise WeightsError(
            f"{folder} lacks {', '.join(missing or [f'{safe}.safetensors'])}: give a whole folder as save_pretrained "
            "writes it"
        )
    tensors = {n: t for name in names for n, t in tensor_files.load(folder / name, str(folder / name)).items()}
    return {_today(n): t for n, t in tensors.items()}


def _today(name: str) -> str:
    parts = name.split(".")
    if len(parts) > 3 and parts[-4] == "attentions" and parts[-2] in _OLD:
        parts[-2] = _OLD[parts[-2]]
    return ".".join(parts)
