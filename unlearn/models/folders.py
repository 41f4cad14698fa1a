"""Folders as diffusers' save_pretrained writes them: their configs and tensors, read without unpickling."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from unlearn.errors import WeightsError
from unlearn.models import tensor_files, wrappers

FILE = "diffusion_pytorch_model"
# What transformers calls its files: in safetensors, and before.
TRANSFORMERS = ("model", "pytorch_model")
# Names of attention in files written before diffusers 0.15.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
logger = logging.getLogger(__name__)


def config(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        text = path.read_text()
        if text.startswith("version https://git-lfs"):
            raise WeightsError(f"{path} is a pointer of git-lfs, not the file itself: fetch that with `git lfs pull`")
        content = json.loads(text)
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
    """The tensors of one model's folder: safetensors, whole or in parts, also of a variant (fp16) alone, or a .bin.

    stems: how the names of its files begin, in safetensors and as .bin. Raises WeightsError.
    """
    places = _places(folder, stems)
    if missing := [name for name in places if not (folder / name).is_file()]:
        raise WeightsError(
            f"{folder} lacks {', '.join(missing)}: give a whole folder as save_pretrained writes it, with all its parts"
        )
    found: dict[str, torch.Tensor] = {}
    for name, listed in places.items():
        part = tensor_files.load(folder / name, str(folder / name))
        if listed is not None and (lost := [n for n in sorted(listed) if n not in part]):
            raise WeightsError(
                f"{folder}: its index says that {name} holds {lost[0]}, which is not there: fetch it again"
            )
        found |= part if listed is None else {n: part[n] for n in listed}
    return {_today(n): t for n, t in wrappers.unwrapped(found, str(folder)).items()}


def _places(folder: Path, stems: tuple[str, str]) -> dict[str, set[str] | None]:
    """The files of a model's folder, and which tensors each is to be asked for; None: for all. Raises WeightsError."""
    for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
        name = f"{stem}.{suffix}"
        if (folder / name).is_file():
            return {name: None}
        if (folder / f"{name}.index.json").is_file():
            return _listed(folder / f"{name}.index.json")
        # A variant is named before the suffix; of one in parts the index is named in one of two ways.
        whole = {
            path.name.split(".")[-2]: path for path in folder.glob(f"{stem}.*.{suffix}") if "-of-" not in path.name
        }
        index = {path.name.split(".")[-2]: path for path in folder.glob(f"{name}.index.*.json")}
        index |= {path.name.split(".")[-4]: path for path in folder.glob(f"{stem}.*.{suffix}.index.json")}
        if variants := whole.keys() | index.keys():
            variant = next((name for name in ("fp16", "bf16") if name in variants), min(variants))
            if len(variants) > 1:
                names = ", ".join(sorted(variants))
                logger.info("%s: of the variants %s of its weights %s is taken", folder, names, variant)
            return {whole[variant].name: None} if variant in whole else _listed(index[variant])
    raise WeightsError(
        f"{folder} lacks {stems[0]}.safetensors: give a whole folder as save_pretrained writes it, with all its parts"
    )


def _listed(index: Path) -> dict[str, set[str] | None]:
    """The parts that an index names, each with its tensors. Raises WeightsError."""
    named = config(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(_is_plain(name) for name in named.values()):
        raise WeightsError(f"{index} is damaged: its weight_map names no files of its folder")
    return {part: {name for name in named if named[name] == part} for part in sorted(set(named.values()))}


def _is_plain(name: Any) -> bool:
    """Whether this is the name of a file, without a folder."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _today(name: str) -> str:
    parts = name.split(".")
    if len(parts) > 3 and parts[-4] == "attentions" and parts[-2] in _OLD:
        parts[-2] = _OLD[parts[-2]]
    return ".".join(parts)
