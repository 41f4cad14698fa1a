"""diffusers' UNet2DModel in three parts: what goes down (the encoder), what goes up (the decoder), the embedding of time.

The parts are diffusers' own blocks, so Decoder(Encoder(x)) computes what UNet2DModel computes. Every network of the family
`diffusion` is a file like this one: Encoder, Decoder, Conditioning, layout, split, from_public, to_public.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import unlearn.torchvision_cpu  # noqa: F401  diffusers imports torchvision

from diffusers import UNet2DModel  # isort: skip

# Part of ours -> names of diffusers' submodules in it.
PARTS = {
    "encoder": ("conv_in", "down_blocks", "mid_block"),
    "decoder": ("up_blocks", "conv_norm_out", "conv_out"),
    "shared": ("time_embedding",),
}


class Encoder(nn.Module):
    """(sample (B, C, H, W), emb (B, E), context) to levels: every skip in the order it is made, then the middle.

    The skips are what conv_in, every ResNet block and every downsampler hand out: all that the decoder sees.
    """

    def __init__(self, whole: UNet2DModel):
        super().__init__()
        self.conv_in, self.down_blocks, self.mid_block = whole.conv_in, whole.down_blocks, whole.mid_block
        self.centre = whole.config.center_input_sample
        self.activation_checkpointing = False

    def forward(self, sample: torch.Tensor, emb: torch.Tensor, context: None = None) -> list[torch.Tensor]:
        checkpointing(self, self.activation_checkpointing)
        sample = self.conv_in(2 * sample - 1 if self.centre else sample)
        levels = [sample]
        for block in self.down_blocks:
            sample, skips = block(sample, emb)
            levels.extend(skips)
        return [*levels, self.mid_block(sample, emb)]


class Decoder(nn.Module):
    """(levels, emb, context) to the prediction (B, C, H, W)."""

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
    """(timesteps (B,), dtype) to (emb (B, E), context): what encoder and decoder both take besides the image."""

    def __init__(self, whole: UNet2DModel):
        super().__init__()
        self.time_proj, self.time_embedding = whole.time_proj, whole.time_embedding

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, None]:
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
    if c.time_embedding_type != "positional" or whole.class_embedding is not None or whole.mid_block is None:
        raise ValueError("only a UNet2DModel with positional time embedding, no class embedding and a middle block is known")
    if any("Skip" in kind for kind in (*c.down_block_types, *c.up_block_types)):
        raise ValueError("blocks with a skip of the image (SkipDownBlock2D ...) are not known")
    return Encoder(whole), Decoder(whole), Conditioning(whole)


def from_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' names to ours; names that are nobody's stay, and are told when the model is filled."""
    return renamed(tensors, PARTS)


def to_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to diffusers'; other parts (`first_stage`) are left out."""
    return {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] in PARTS}


def renamed(tensors: dict[str, torch.Tensor], parts: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Each name with the part before it that its first word belongs to."""
    part = {word: name for name, words in parts.items() for word in words}
    return {f"{part[n.split('.')[0]]}.{n}" if n.split(".")[0] in part else n: t for n, t in tensors.items()}


def checkpointing(module: nn.Module, on: bool) -> None:
    """Tell diffusers' blocks inside `module` whether to compute their activations anew in the backward pass."""
    for block in module.modules():
        if getattr(block, "gradient_checkpointing", on) != on:
            block.gradient_checkpointing = on
            block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
