"""MI-GAN (ICCV 2023): a small convolutional inpainting generator, an encoder with skips and a synthesis network.

A block is named by the resolution that it works at when the image has `resolution` pixels a side. A smaller image runs
through the same blocks, each at a proportionally smaller resolution.
Shapes: B images of S x S pixels; block b{R} works at R * S / resolution pixels a side.
"""

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import nn

from unlearn.errors import WeightsError
from unlearn.models import base, tensor_files
from unlearn.views import View

# The files that `to_folder` writes, with the public names: the weights alone, and what MI-GAN's own code loads.
PUBLIC_FILE, WHOLE_FILE = "migan.safetensors", "migan.pt"
# MI-GAN's code keeps the constants of its resampling among the weights.
_CONSTANT = re.compile(r"(?:down|up)sample\.(filter|insert_zeros)(?:\.weight)?|(?:.*\.)?(?:\w*_)?filter")


# The layer whose output is the skip of a resolution.
_SKIP = re.compile(r"encoder\.b(\d+)\.conv1\.conv2\.weight")


class MIGANOptions(base.ModelOptions):
    """Defaults are those of the model trained on Places2 at 512 pixels.

    resolution: pixels a side of the images it was made for.
    image_size: pixels a side of the images it is used on: the resolution, half or a quarter of it.
    channel_base, channel_max: a block b{R} is min(channel_base / R, channel_max) channels wide.
    """

    image_size: int = 512
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resolution: int = 512
    channel_base: int = 32768
    channel_max: int = 512
    grid: int = 16

    @model_validator(mode="before")
    @classmethod
    def _whole_images(cls, values: Any) -> Any:
        """A smaller model is used at its own resolution, where nothing else is said."""
        if isinstance(values, dict) and "image_size" not in values and isinstance(r := values.get("resolution"), int):
            return values | {"image_size": r} if r < 512 else values
        return values

    @model_validator(mode="after")
    def _fits(self):
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution {self.resolution} must be a power of two, 8 or more")
        if self.image_size not in [self.resolution // d for d in (1, 2, 4)]:
            raise ValueError(
                f"image_size {self.image_size} must be the resolution {self.resolution}, half or a quarter of it"
            )
        if self.image_size % self.grid:
            raise ValueError(f"image_size {self.image_size} is not a multiple of grid {self.grid}")
        if self.channel_base < self.resolution:
            raise ValueError(f"channel_base {self.channel_base} leaves block b{self.resolution} no channel")
        return self

    @property
    def resolutions(self) -> list[int]:
        """The resolutions of the blocks: resolution, resolution / 2, ..., 4."""
        return [self.resolution >> i for i in range(self.resolution.bit_length() - 2)]

    def width(self, resolution: int) -> int:
        return min(self.channel_base // resolution, self.channel_max)


def activate(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU times sqrt 2, clamped to +-256; in place where the backward pass does not need the value."""
    return F.hardtanh_(F.leaky_relu(x, 0.2).mul_(math.sqrt(2)), -256, 256)


LOW_PASS = torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64
STUFFING = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # a pixel becomes four, three of them zero


@functools.cache
def _fir(channels: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The low-pass filter (1, 3, 3, 1) in both directions, with sum 1: depthwise, (channels, 1, 4, 4)."""
    # A tensor made in inference mode could not be used for training later.
    with torch.inference_mode(False):
        return LOW_PASS.to(device, dtype).expand(channels, 1, 4, 4).contiguous()


def downsample(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, C, H / 2, W / 2), low-passed."""
    return F.conv2d(x, _fir(x.shape[1], x.device, x.dtype), stride=2, padding=1, groups=x.shape[1])


def upsample(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, C, 2H, 2W): zeros between the pixels, low-passed with gain 4."""
    return F.conv_transpose2d(x, 4 * _fir(x.shape[1], x.device, x.dtype), stride=2, padding=1, groups=x.shape[1])


class SeparableConv(nn.Module):
    """Depthwise 3x3, activation, [half the size], pointwise, [twice the size], [constant noise], activation.

    noise: the side of the constant noise map; 0 = none. A smaller image takes the map's first rows and columns.
    """

    noise_const: torch.Tensor
    noise_strength: torch.Tensor

    def __init__(self, channels: int, out: int, down: bool = False, up: bool = False, noise: int = 0):
        super().__init__()
        self.down, self.up = down, up
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.conv2 = nn.Conv2d(channels, out, 1, bias=False)
        if noise:
            self.register_buffer("noise_const", torch.randn(noise, noise))
            # In public weights it is 1; a model trained here from nothing, without a discriminator, needs no noise.
            self.register_buffer("noise_strength", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = activate(self.conv1(x))
        x = self.conv2(downsample(x) if self.down else x)
        x = upsample(x) if self.up else x
        if hasattr(self, "noise_const"):
            noise = self.noise_const[: x.shape[2], : x.shape[3]] * self.noise_strength
            x = x + noise.to(x.dtype)  # DeepSpeed leaves buffers in float32
        return activate(x)


class EncoderBlock(nn.Module):
    """x to (the skip of this resolution, what the next block takes)."""

    def __init__(self, o: MIGANOptions, resolution: int):
        super().__init__()
        width, last = o.width(resolution), resolution == 4
        self.conv1 = SeparableConv(width, width)
        self.conv2 = SeparableConv(width, o.width(max(resolution // 2, 4)), down=not last)
        if resolution == o.resolution:
            self.fromrgb = nn.Conv2d(4, width, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        skip = self.conv1(activate(self.fromrgb(x)) if hasattr(self, "fromrgb") else x)
        return skip, self.conv2(skip)


class Encoder(base.CheckpointedModule):
    """(B, 4, S, S) = (0.5 - hole, visible pixels) to [bottleneck, skip of b{resolution}, ..., skip of b4]."""

    def __init__(self, o: MIGANOptions):
        super().__init__()
        self.names = [f"b{r}" for r in o.resolutions]
        for r, name in zip(o.resolutions, self.names, strict=True):
            self.add_module(name, EncoderBlock(o, r))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        # Depthwise convolutions are several times faster with channels last.
        x, skips = x.contiguous(memory_format=torch.channels_last), []
        for name in self.names:
            skip, x = self.checkpointed(getattr(self, name), x)
            skips.append(skip)
        return [x, *skips]


class SynthesisBlock(nn.Module):
    """(x, skip, RGB so far) to (x, RGB) at twice the size; the first block keeps the size and is given no RGB."""

    def __init__(self, o: MIGANOptions, resolution: int):
        super().__init__()
        first = resolution == 4
        before, width, noise = o.width(4 if first else resolution // 2), o.width(resolution), 0 if first else resolution
        self.conv1 = SeparableConv(before, width, up=not first, noise=noise)
        self.conv2 = SeparableConv(width, width, noise=noise)
        self.torgb = nn.Conv2d(width, 3, 1)

    def forward(
        self, x: torch.Tensor, skip: torch.Tensor, rgb: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.conv2(self.conv1(x) + skip)
        own = self.torgb(x)
        return x, own if rgb is None else upsample(rgb) + own


class Synthesis(nn.Module):
    """[bottleneck, skips] to normalised images (B, 3, S, S), the visible pixels included."""

    def __init__(self, o: MIGANOptions):
        super().__init__()
        self.names = [f"b{r}" for r in reversed(o.resolutions)]
        for r, name in zip(reversed(o.resolutions), self.names, strict=True):
            self.add_module(name, SynthesisBlock(o, r))

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        x, *skips = levels
        rgb = None
        for name, skip in zip(self.names, reversed(skips), strict=True):
            x, rgb = getattr(self, name)(x, skip, rgb)
        assert rgb is not None, "there is always a block"
        return rgb


class MIGAN(base.Adapter):
    """The embedding compared is the bottleneck, (B, W, s, s), and the skip of every resolution."""

    family = "migan"
    Options = MIGANOptions
    encoder_sees_hole = False
    variants = {
        "migan_512": {},
        "migan_256": {"image_size": 256},
        "migan_128": {"image_size": 128},
        "migan_nano_32": {"image_size": 32, "resolution": 32, "channel_base": 1024, "channel_max": 96, "grid": 8},
    }

    options: MIGANOptions
    encoder: Encoder
    decoder: Synthesis

    def __init__(self, options: MIGANOptions):
        super().__init__(options)
        self.encoder = Encoder(options)
        self.decoder = Synthesis(options)
        self._flops: int | None = None
        self._initialise()

    def _initialise(self):
        """Weights that keep the variance: the activation has a gain of its own."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def grid(self) -> int:
        return self.options.grid

    def encode(self, inputs: torch.Tensor, view: View, seed: int = 0) -> list[torch.Tensor]:
        hole = view.pixel_mask(inputs.shape[-1])
        visible = torch.where(hole, 0, inputs)
        return self.encoder(torch.cat([0.5 - hole.to(visible.dtype), visible], dim=1))

    def reconstruct(self, images: torch.Tensor, view: View) -> torch.Tensor:
        filled = self.decoder(self.encode(images, view))
        return torch.where(view.pixel_mask(images.shape[-1]), filled.to(images.dtype), images)

    def predict(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """Normalised images (B, 3, S, S), the visible pixels included."""
        return self.decoder(self.encode(inputs, view))

    def targets(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        return inputs

    def loss(self, predictions: torch.Tensor, targets: torch.Tensor, view: View) -> torch.Tensor:
        """Mean absolute error in the hole, in normalised pixels.

        The public weights were trained against a discriminator as well; that is not repeated here, so a model trained
        from nothing fills holes with blur.
        """
        hole = view.pixel_mask(targets.shape[-1])
        return torch.where(hole, (predictions - targets).float().abs(), 0).sum() / (3 * hole.sum())

    def difference(self, one: torch.Tensor, other: torch.Tensor, view: View) -> torch.Tensor:
        hole = view.pixel_mask(one.shape[-1])
        squared = (one.to(torch.promote_types(one.dtype, torch.float32)) - other).square()
        return torch.where(hole, squared, 0).sum() / (3 * hole.sum())

    def flops(self, view: View) -> int:
        if self._flops is None:
            size = self.options.image_size
            with torch.device("meta"):
                encoder, x = Encoder(self.options), torch.empty(1, 4, size, size)
            self._flops = base.count_flops(lambda: encoder(x))
        return self._flops

    @classmethod
    def from_public(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The names of Picsart-AI-Research/MI-GAN, with or without its constants: `synthesis.*` is the decoder."""
        learned = {name: tensor for name, tensor in tensors.items() if not _is_constant(name, tensor)}
        return {_swap(name, "synthesis.", "decoder."): tensor for name, tensor in learned.items()}

    @classmethod
    def from_file(
        cls, tensors: dict[str, torch.Tensor], arguments: dict[str, Any], chosen: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """A public file, whose blocks tell the resolution and the widths."""
        renamed = cls.from_public(tensors)
        widths = {int(m[1]): t.shape[0] for n, t in renamed.items() if (m := _SKIP.fullmatch(n)) and t.dim() == 4}
        if not {4, 8} <= widths.keys():
            return renamed, None
        resolution, largest = max(widths), widths[4]
        told = {"resolution": resolution, "channel_base": widths[resolution] * resolution}
        if largest > 512 or largest * 4 != told["channel_base"]:
            told["channel_max"] = largest
        return renamed, told

    def to_folder(self, folder: Path, origin: Path | None = None) -> str:
        """Write PUBLIC_FILE and WHOLE_FILE."""
        tensors = {_swap(name, "decoder.", "synthesis."): t for name, t in self.state_dict().items()}
        tensor_files.save(tensors, folder / PUBLIC_FILE)
        dtype = next(iter(tensors.values())).dtype
        constants = {name: t.to(dtype) for name, t in self._constants().items()}
        torch.save({name: t.detach().contiguous() for name, t in (tensors | constants).items()}, folder / WHOLE_FILE)
        return f"Generator({self.options.resolution}).load_state_dict(torch.load(FOLDER + '/{WHOLE_FILE}'))"

    def _constants(self) -> dict[str, torch.Tensor]:
        """The constants of MI-GAN's code, by its names."""
        found: dict[str, torch.Tensor] = {}

        def up(name: str, channels: int) -> None:
            found[f"{name}.upsample.filter.weight"] = (4 * LOW_PASS).repeat(channels, 1, 1, 1)
            found[f"{name}.upsample.insert_zeros.weight"] = STUFFING.repeat(channels, 1, 1, 1)

        for name, module in self.named_modules():
            name = _swap(name, "decoder.", "synthesis.")
            if isinstance(module, SeparableConv) and module.down:
                found[f"{name}.downsample.filter.weight"] = LOW_PASS.repeat(module.conv2.in_channels, 1, 1, 1)
            elif isinstance(module, SeparableConv) and module.up:
                up(name, module.conv2.out_channels)
            elif isinstance(module, SynthesisBlock) and module.conv1.up:
                up(name, module.torgb.out_channels)
        return found


def _is_constant(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of a public file is a constant. Raises WeightsError where it has other values than MI-GAN's."""
    stem = ".".join(name.split(".")[-3:])
    match = _CONSTANT.search(stem)
    if match is None or match.end() != len(stem):
        return False
    expected = STUFFING if match[1] == "insert_zeros" else LOW_PASS
    found = torch.outer(tensor, tensor) if tensor.dim() == 1 else tensor
    kernels = found.float().reshape(-1, *found.shape[-2:])
    gain = {"downsample": 1, "upsample": 4}.get(stem.split(".")[-3] if match[1] == "filter" else "")
    kernels = kernels / (gain or kernels.sum((1, 2), keepdim=True))
    if kernels.shape[1:] != expected.shape or not torch.allclose(kernels, expected.expand_as(kernels), atol=1e-3):
        raise WeightsError(f"{name} is another filter than MI-GAN's (1, 3, 3, 1): such a model is not supported")
    return True


def _swap(name: str, prefix: str, other: str) -> str:
    """`name` with the prefix `other` where it has `prefix`."""
    return other + name.removeprefix(prefix) if name.startswith(prefix) else name
