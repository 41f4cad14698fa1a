"""diffusers' UNet2DModel in three parts: the way down (encoder), the way up (decoder), the embedding of time.

The parts are diffusers' own blocks, so Decoder(Encoder(x)) computes what UNet2DModel computes. Every network of the
family `diffusion` is a file like this one, with Encoder, Decoder, Conditioning, layout, split, from_public, to_public.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import unlearn.torchvision_cpu  # noqa: F401  diffusers imports torchvision
from unlearn.models.base import CheckpointedModule

from diffusers import UNet2DModel  # isort: skip

# Part of our model -> the names of diffusers' submodules in it.
PARTS = {
    "encoder": ("conv_in", "down_blocks", "mid_block"),
    "decoder": ("up_blocks", "conv_norm_out", "conv_out"),
    "shared": ("time_embedding",),
}


class Encoder(CheckpointedModule):
    """(sample (B, C, H, W), emb (B, E), context) to levels: every skip in the order in which it is computed, then the
    middle.

    The skips are the outputs of conv_in, of every ResNet block and of every downsampler: all that the decoder is given.
    """

    def __init__(self, whole: UNet2DModel):
        super().__init__()
        self.conv_in, self.down_blocks = whole.conv_in, whole.down_blocks
        self.mid_block = whole.get_submodule("mid_block")
        self.centre = whole.config["center_input_sample"]

    def forward(self, sample: torch.Tensor, emb: torch.Tensor, context: None = None) -> list[torch.Tensor]:
        set_checkpointing(self, self.activation_checkpointing)
        sample = self.conv_in(2 * sample - 1 if self.centre else sample)
        levels = [sample]
        for block in self.down_blocks:
            sample, skips = block(sample, emb)
            levels.extend(skips)
        return [*levels, self.mid_block(sample, emb)]


class Decoder(nn.Module):
    """(levels, emb, context) to the prediction (B, C, H, W)."""

    up_blocks: Any  # a ModuleList of blocks that have `resnets`

    def __init__(self, whole: UNet2DModel):
        super().__init__()
        self.up_blocks = whole.up_blocks
        self.conv_norm_out, self.conv_act, self.conv_out = whole.conv_norm_out, whole.conv_act, whole.conv_out

    def forward(self, levels: list[torch.Tensor], emb: torch.Tensor, context: None = None) -> torch.Tensor:
        *skips, sample = levels
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, own = skips[:-count], tuple(skips[-count:])
            sample = block(sample, own, emb)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class Conditioning(nn.Module):
    """(timesteps (B,), dtype, texts) to (emb (B, E), context): what encoder and decoder are both given besides the
    image."""

    def __init__(self, whole: UNet2DModel):
        super().__init__()
        self.time_proj, self.time_embedding = whole.time_proj, whole.time_embedding

    def forward(self, t: torch.Tensor, dtype: torch.dtype, texts: None = None) -> tuple[torch.Tensor, None]:
        return self.time_embedding(self.time_proj(t).to(dtype)), None


def layout(noisy: torch.Tensor, known: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The encoder's sample (B, 2 C, S, S): the condition, and the same image with what is noisy in its hole.

    noisy, known: (B, C, S, S), the known one with Gaussian noise in its hole. hidden: (B, 1, S, S), true in the hole.
    """
    return torch.cat([known, torch.where(hidden, noisy, known)], dim=1)


def split(config: dict[str, Any]) -> tuple[Encoder, Decoder, Conditioning]:
    """The three parts of the network that diffusers builds from this config; dropout is left out. Raises ValueError."""
    whole = UNet2DModel(**{**config, "dropout": 0.0})
    c = whole.config
    if c["time_embedding_type"] != "positional" or whole.class_embedding is not None or whole.mid_block is None:
        raise ValueError(
            "only a UNet2DModel with positional time embedding, no class embedding and a middle block is known"
        )
    if any("Skip" in kind for kind in (*c["down_block_types"], *c["up_block_types"])):
        raise ValueError("blocks with a skip of the image (SkipDownBlock2D ...) are not known")
    return Encoder(whole), Decoder(whole), Conditioning(whole)


def from_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' names to ours; unknown names are kept, so that filling the model reports them as unexpected."""
    return renamed(tensors, PARTS)


def to_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to diffusers'; tensors of other parts are left out."""
    return {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] in PARTS}


def renamed(tensors: dict[str, torch.Tensor], parts: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Each name with the part put before it that has its first word in `parts`."""
    part = {word: name for name, words in parts.items() for word in words}
    return {f"{part[n.split('.')[0]]}.{n}" if n.split(".")[0] in part else n: t for n, t in tensors.items()}


def set_checkpointing(module: nn.Module, on: bool) -> None:
    """Switch the activation checkpointing of diffusers' blocks inside `module` on or off."""
    for block in cast(Iterable[Any], module.modules()):
        if getattr(block, "gradient_checkpointing", on) != on:
            block.gradient_checkpointing = on
            block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
