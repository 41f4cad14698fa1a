"""VQ-GAN tokenizers (arXiv 2012.09841): images to a grid of codes and back.

Two architectures: `mage`, the convolutions of MaskGIT as the public MAGE tokenizer has them, and `diffusers`, those of
`diffusers.VQModel` (taming-transformers). Shapes: B images, L = G x G codes, C channels of a code, N codes.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unlearn.models import folders, tensor_files, weights
from unlearn.views import View

# Beginnings of names in a public tokenizer -> the names in our model that replace them. The codebook is in our model
# twice, since the first stage is taken away before training.
TOKENIZER_NAMES = {
    "encoder.": ["first_stage.encoder."],
    "quant_conv.": ["first_stage.quant_conv."],
    "quantize.embedding.": ["first_stage.codebook.", "decoder.codebook."],
    "post_quant_conv.": ["decoder.post_quant_conv."],
    "decoder.": ["decoder.pixels."],
}
# Beginnings of names that belong to a tokenizer's training only: the discriminator and the perceptual network.
TRAINING_NAMES = ("loss.",)
# The names of all our tensors that a tokenizer fills begin with one of these.
TOKENIZER_TENSORS = tuple(sorted({ours for names in TOKENIZER_NAMES.values() for ours in names}))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut around them.

    Where the width changes, the shortcut is a projection of the convolutions' own result, as in the public weights.
    """

    def __init__(self, inside: int, outside: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outside, eps=1e-6)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(outside, outside, 1, bias=False)
        self.same = inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.same else self.nin_shortcut(h))


def _levels(inside: tuple[int, ...], outside: tuple[int, ...], count: int, groups: int) -> nn.ModuleList:
    """For each resolution {"block": its residual blocks}."""

    def blocks(i: int, o: int) -> nn.ModuleList:
        return nn.ModuleList(ResidualBlock(o if n else i, o, groups) for n in range(count))

    return nn.ModuleList(nn.ModuleDict({"block": blocks(i, o)}) for i, o in zip(inside, outside, strict=True))


def _middle(width: int, groups: int) -> nn.ModuleDict:
    return nn.ModuleDict({f"block_{n}": ResidualBlock(width, width, groups) for n in (1, 2)})


class MageEncoder(nn.Module):
    """(B, 3, S, S) to latents (B, C, G, G); each level but the last halves the side by averaging."""

    def __init__(self, channels: tuple[int, ...], layers: int, groups: int, latent: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.down = _levels((channels[0], *channels[:-1]), channels, layers, groups)
        self.mid = _middle(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], latent, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for number, level in enumerate(self.down):
            x = F.avg_pool2d(x, 2) if number else x
            for block in level.get_submodule("block").children():
                x = block(x)
        x = self.mid["block_2"](self.mid["block_1"](x))
        return self.conv_out(F.silu(self.norm_out(x)))


class MageDecoder(nn.Module):
    """Latents (B, C, G, G) to images (B, 3, S, S)."""

    def __init__(self, channels: tuple[int, ...], layers: int, groups: int, latent: int):
        super().__init__()
        self.conv_in = nn.Conv2d(latent, channels[-1], 3, padding=1)
        self.mid = _middle(channels[-1], groups)
        self.up = _levels((*channels[1:], channels[-1]), channels, layers, groups)
        for level, width in zip(self.up[1:], channels[1:], strict=True):
            level.add_module("upsample", nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)}))
        self.norm_out = nn.GroupNorm(groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        x = self.mid["block_2"](self.mid["block_1"](x))
        for number, level in reversed(list(enumerate(self.up))):
            for block in level.get_submodule("block").children():
                x = block(x)
            if number:
                x = level.get_submodule("upsample.conv")(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


def encoder(o) -> nn.Module:
    """The network from pixels to latents. o: MAGEOptions, of unlearn.models.mage."""
    if o.tokenizer == "mage":
        return MageEncoder(o.channels, o.layers, o.norm_groups, o.code_width)
    from diffusers.models.autoencoders.vae import Encoder

    return Encoder(3, o.latent_channels, ("DownEncoderBlock2D",) * len(o.channels), double_z=False, **_diffusers(o))


def decoder(o) -> nn.Module:
    """The network from latents to pixels. o: MAGEOptions."""
    if o.tokenizer == "mage":
        return MageDecoder(o.channels, o.layers, o.norm_groups, o.code_width)
    from diffusers.models.autoencoders.vae import Decoder

    return Decoder(o.latent_channels, 3, ("UpDecoderBlock2D",) * len(o.channels), **_diffusers(o))


def _diffusers(o) -> dict[str, Any]:
    return {
        "block_out_channels": o.channels, "layers_per_block": o.layers, "norm_num_groups": o.norm_groups,
        "mid_block_add_attention": o.mid_attention,
    }  # fmt: skip


def projection(o, inside: int, outside: int) -> nn.Module:
    """The layer between latents and codes; MAGE's tokenizer has none."""
    return nn.Identity() if o.tokenizer == "mage" else nn.Conv2d(inside, outside, 1)


class Range(nn.Module):
    """Normalised images to the tokenizer's range, [0, 1] for `mage` and [-1, 1] for `diffusers`; and the inverse."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, o):
        super().__init__()
        self.low = 0.0 if o.tokenizer == "mage" else -1.0
        for name, values in (("mean", o.mean), ("std", o.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.low + (1 - self.low) * (images * self.std + self.mean).clamp(0, 1)).to(images.dtype)

    def inverse(self, images: torch.Tensor) -> torch.Tensor:
        return (((images - self.low) / (1 - self.low) - self.mean) / self.std).to(images.dtype)


class Tokenizer(nn.Module):
    """(normalised images, view) to tokens, int64 (B, 2, L).

    First those of the image with its hole filled with the mean colour, which know nothing of what is hidden; then those
    of the whole image, which training has to predict.
    """

    every: torch.Tensor

    def __init__(self, o):
        super().__init__()
        self.range = Range(o)
        self.encoder = encoder(o)
        self.quant_conv = projection(o, o.latent_channels, o.code_width)
        self.codebook = nn.Embedding(o.codes, o.code_width)
        self.register_buffer("every", torch.arange(o.codes), persistent=False)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, G, G) of normalised images."""
        return self.quant_conv(self.encoder(self.range(images)))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Numbers of the nearest codes, (B, L) int64."""
        latents = self.latents(images).flatten(2).transpose(1, 2)
        return distances(latents, self.codebook(self.every)).argmin(2)

    def forward(self, images: torch.Tensor, view: View) -> torch.Tensor:
        visible = images.masked_fill(view.pixel_mask(images.shape[-1]), 0)
        return torch.stack([self.tokens(visible), self.tokens(images)], dim=1)


def distances(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Distances (..., N) of vectors (..., C) to codes (N, C), in float32 or better, under autocast too."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return torch.cdist(vectors.to(dtype), codes.to(dtype))


def loss(first_stage: Tokenizer, decoder, images: torch.Tensor) -> torch.Tensor:
    """The loss that a tokenizer is trained with (arXiv 1711.00937), a scalar.

    It is the squared error of the normalised images, plus that of codes to latents, plus a quarter of that of latents
    to codes. decoder: has a copy of the codebook, and `paint`, from codes (B, C, G, G) to images.
    """
    latents = first_stage.latents(images)
    vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
    # Both copies of the codebook get the same gradient, to the bit, and so stay equal.
    codes = (first_stage.codebook(first_stage.every) + decoder.codebook(first_stage.every)) / 2
    with torch.no_grad():
        between = distances(vectors, codes)
        nearest_code, nearest_vector = between.argmin(1), between.argmin(0)
        unused = torch.ones_like(first_stage.every).scatter(0, nearest_code, 0)
    chosen = codes[nearest_code]
    # The gradient passes by the choice: it reaches the latents as if they had been decoded themselves.
    straight = vectors + (chosen - vectors).detach()
    painted = decoder.paint(straight.unflatten(0, (len(images), *latents.shape[2:])).permute(0, 3, 1, 2))
    codes_to_latents = (chosen - vectors.detach()).square().mean()
    latents_to_codes = (vectors - chosen.detach()).square().mean()
    # A code that no latent chooses is pulled to the latent nearest to it, so that none stays unused.
    revival = ((codes - vectors[nearest_vector].detach()).square() * unused[:, None]).mean()
    return (painted - images).square().mean() + codes_to_latents + 0.25 * latents_to_codes + revival


def from_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a tokenizer in our names; taming-transformers, MAGE and diffusers name them alike."""
    ours = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in TOKENIZER_NAMES if name.startswith(p)), None)
        if prefix is not None:
            ours |= {replacement + name.removeprefix(prefix): tensor for replacement in TOKENIZER_NAMES[prefix]}
        elif not name.startswith(TRAINING_NAMES):
            ours[name] = tensor  # unknown: kept, so that filling the model reports it as unexpected
    return ours


def to_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of our tensors that are the tokenizer's, with its own names."""
    return {
        theirs + n.removeprefix(ours): t
        for theirs, (ours, *_) in TOKENIZER_NAMES.items() for n, t in tensors.items() if n.startswith(ours)
    }  # fmt: skip


def read(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a tokenizer with our names, from a folder of ours or of diffusers, or a file. Raises WeightsError."""
    if path.is_dir() and (path / weights.CARD).is_file():
        tensors = tensor_files.load(path / weights.WEIGHTS, str(path))
        return {name: tensor for name, tensor in tensors.items() if name.startswith(TOKENIZER_TENSORS)}
    if path.is_dir():
        return from_public(folders.tensors(path))
    tensors = tensor_files.read(path, str(path))[0]
    # Within a file of MAGE it has a prefix.
    inside = {name.removeprefix("vqgan."): tensor for name, tensor in tensors.items() if name.startswith("vqgan.")}
    return from_public(inside or tensors)
