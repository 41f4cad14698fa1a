"""Files of tensors: read by memory map, written one tensor after the other. No file is in memory whole.

Nothing is unpickled.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from unlearn.aliases import tensor_name
from unlearn.errors import WeightsError

# Torch aligns its tensors to so many bytes. With another alignment, products of the same numbers may round differently.
ALIGNED = 64
logger = logging.getLogger(__name__)

# Where a training checkpoint keeps its weights, and where the moving average of them.
_WEIGHTS, _AVERAGES = ("model", "state_dict", "model_state_dict", "module"), ("model_ema", "state_dict_ema", "ema")
# What wrappers put before every name: DistributedDataParallel, torch.compile, Lightning, a moving average.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "model_ema.")
_GLOBAL = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class) ([\w.]+)")
_LFS = b"version https://git-lfs"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# What safetensors calls the types of numbers.
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def load(path: Path, uri: str) -> dict[str, torch.Tensor]:
    """The tensors of a local .safetensors or .pth file, mapped: they take memory where they are written to.

    uri: names the file in messages. Raises WeightsError.
    """
    return read(path, uri)[0]


def read(path: Path, uri: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(what `load` gives, the arguments that the program which wrote the file was called with, where it says them)."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise WeightsError(f"{uri} is a pointer of git-lfs, not the file itself: fetch that with `git lfs pull`")
    try:
        if path.suffix == ".safetensors":
            return {tensor_name(name): tensor for name, tensor in _unwrapped(load_file(path), uri).items()}, {}
        # Public training checkpoints keep their argparse options beside the weights: plain data, allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files of torch before 1.6 are no zip files, and cannot be mapped.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged pickle can raise any exception
        raise WeightsError(f"{uri} cannot be read as weights (safe formats only): {_why(e)}") from None
    arguments = tensors.get("args") if isinstance(tensors, dict) else None
    tensors = _chosen(tensors, uri)
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        keys = ", ".join(str(key)[:40] for key in list(tensors)[:8]) if isinstance(tensors, dict) else ""
        there = f": its keys are {keys}; save the one of the weights alone" if keys else ""
        raise WeightsError(f"{uri} holds no dictionary of tensors{there}")
    return _unwrapped(tensors, uri), vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _chosen(content: Any, uri: str) -> Any:
    """Of a training checkpoint the weights; their moving average where it has nothing else."""
    for key in (*_WEIGHTS, *_AVERAGES):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            also = [name for name in _AVERAGES if name != key and isinstance(content.get(name), dict)]
            if also:
                logger.info("%s: its %s is taken; it holds %s too, which can be saved alone", uri, key, ", ".join(also))
            content = content[key]
    return content


def _unwrapped(tensors: dict[str, torch.Tensor], uri: str) -> dict[str, torch.Tensor]:
    """The tensors without what wrappers of the model have put before every name, and without an average beside them."""
    if averages := [name for name in tensors if name.startswith("model_ema.")]:
        if len(averages) < len(tensors):
            logger.info("%s: the moving average in it (model_ema.*) is left out; save it alone to take it", uri)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model_ema.")}
    while tensors:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in tensors)), None)
        # In the files of Stable Diffusion this is the network's own name.
        if prefix is None or any(name.startswith("model.diffusion_model.") for name in tensors):
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name.replace("._orig_mod.", "."): tensor for name, tensor in tensors.items()}


def _why(error: Exception) -> str:
    """Why a file cannot be read, in one line, with the way out where it holds more than plain data."""
    text = _ANSI.sub("", str(error))
    if found := _GLOBAL.search(text):
        return (
            f"it holds {found[1]}, which is no plain data. If you trust it, open it with torch.load(FILE, "
            "weights_only=False) and save its dictionary of tensors alone"
        )
    text = text.partition("WeightsUnpickler error: ")[2] or text
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def save(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    floats: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> str:
    """Write a safetensors file; its sha256. Of one tensor at a time there is a copy, where it needs one to be written.

    floats: what floating-point numbers are written as, where not as they are. metadata: words of the file's header.
    """
    dtypes = {n: floats if floats and t.is_floating_point() else t.dtype for n, t in tensors.items()}
    sizes = {n: t.numel() * dtypes[n].itemsize for n, t in tensors.items()}
    # Tensors after which the next one is aligned come first, so that a model can be used where the file is mapped.
    order = sorted(tensors, key=lambda n: (sizes[n] % ALIGNED > 0, -dtypes[n].itemsize, n))
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + sizes[name]
        header[name] = {"dtype": _TYPES[dtypes[name]], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    digest = hashlib.sha256()
    path.unlink(missing_ok=True)  # a file of that name may be mapped by a model that is being written
    with open(path, "wb") as file:
        for data in _contents(text, (tensors[name].detach().to("cpu", dtypes[name]) for name in order)):
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _contents(header: bytes, tensors: Iterator[torch.Tensor]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little") + header
    for t in tensors:
        yield t.contiguous().view(-1).view(torch.uint8).numpy()


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Modules made in here by this thread have parameters on the meta device, for `assign`; their buffers are real."""
    thread = threading.get_ident()

    def empty(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    # torch declares hooks that return nothing, and takes the parameter that one returns.
    hook = register_module_parameter_registration_hook(empty)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        hook.remove()


def check(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise WeightsError that names every tensor missing, extra or misshapen; source: where they come from."""
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
            f"{source} does not fit the model: {'; '.join(wrong[:12])}{more}. "
            "Give the model.variant or model.options of these weights."
        )


def assign(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make tensors the parameters and buffers of a module, in the types that it has; others of the module stay.

    Mapped ones are taken as they are, and copied where they are not aligned. No two share memory afterwards.
    """
    own = module.state_dict()
    cast = {n: t.detach().to(own[n].dtype) for n, t in tensors.items()}
    end = 0
    for name, t in sorted(cast.items(), key=lambda item: item[1].data_ptr()):
        if t.data_ptr() < end or t.data_ptr() % ALIGNED or not t.is_contiguous():
            cast[name] = t.clone(memory_format=torch.contiguous_format)
        else:
            end = t.data_ptr() + t.numel() * t.element_size()
    module.load_state_dict(cast, strict=False, assign=True)
