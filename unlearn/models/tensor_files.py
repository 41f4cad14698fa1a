"""Files of tensors: read by memory map, written one tensor after the other. No file is in memory whole.

Nothing is unpickled.
"""

import argparse
import contextlib
import hashlib
import json
import re
import threading
import warnings
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
from unlearn.models import file_formats, wrappers

# Torch aligns its tensors to so many bytes. With another alignment, products of the same numbers may round differently.
ALIGNED = 64
# Types of numbers that weights may have.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# How the names of tensors end that say how others were quantised.
_QUANTISED = re.compile(
    r"(?:^|[._])(?:weight_scale(?:_inv)?|scale_weight|input_scale|scale_input|scaled_fp8|absmax|quant_map|SCB|qweight|"
    r"qzeros|g_idx|zero_point|weight_format|quant_state\..+)$"
)
# What safetensors calls the types of numbers.
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def load(path: Path, uri: str) -> dict[str, torch.Tensor]:
    """The tensors of a local file, by the names they have there, mapped: they take memory where they are written to.

    uri: names the file in messages. Raises WeightsError.
    """
    return _stored(path, uri)[0]


def read(path: Path, uri: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(the tensors of a public checkpoint, by the names of the model itself; the arguments that the program which wrote
    it was called with, where it says them). Raises WeightsError."""
    tensors, arguments = _stored(path, uri)
    return wrappers.unwrapped(tensors, uri), arguments


def _stored(path: Path, uri: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, whatever its name ends with, and the arguments beside them."""
    safe = file_formats.is_safetensors(path, uri)
    try:
        if safe:
            return {tensor_name(name): tensor for name, tensor in load_file(path).items()}, {}
        # Public training checkpoints keep their argparse options beside the weights: plain data, allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in protocols that torch does not write
            # Files of torch before 1.6 are no zip files, and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged pickle can raise any exception
        raise file_formats.unreadable(uri, file_formats.why(e)) from None
    return wrappers.chosen(content, uri), wrappers.arguments(content)


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
    _check_numbers(own, tensors, source)
    check_kind(own, tensors, source)
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


def check_kind(own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise WeightsError where these are tensors of something else than the model that has `own`."""
    if any("lora_" in name for name in tensors):
        raise WeightsError(f"{source} holds changes to a model (LoRA): give a model that they were merged into")
    if not own.keys() & tensors.keys():
        there = f"such as {next(iter(tensors))}" if tensors else "none at all"
        raise WeightsError(
            f"{source} holds other tensors ({there}) than this model, whose first is {next(iter(own))}: it is of "
            "another kind. Is model.family the right one?"
        )


def _check_numbers(own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise WeightsError for numbers that are no weights as they stand: quantised ones, whole or complex ones."""
    plain = "give the weights with numbers of 16 or 32 bits (float16, bfloat16, float32)"
    for name, t in tensors.items():
        if _QUANTISED.search(name):
            raise WeightsError(f"{source} is quantised, as its {name} says: {plain}")
        if name in own and own[name].is_floating_point() and t.dtype not in FLOATS:
            kind = str(t.dtype).removeprefix("torch.")
            raise WeightsError(f"{source}: {name} has numbers of the type {kind}, as quantised weights have: {plain}")


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
