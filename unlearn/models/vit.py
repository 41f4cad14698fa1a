"""What the Vision Transformers of the families `mae` and `mage` share: options, blocks, initialisation, FLOPs.

Shapes: B images, L tokens, W width.
"""

import functools
from typing import Any

import torch
from pydantic import model_validator
from torch import nn

import unlearn.torchvision_cpu  # noqa: F401  timm imports torchvision
from unlearn.models import base

from timm.models.vision_transformer import Block  # isort: skip

EPS = 1e-6  # of the layer norms in and after the blocks


class ViTOptions(base.ModelOptions):
    """An encoder of ViT-B's size, and a decoder."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 8
    decoder_heads: int = 16
    mlp_ratio: float = 4.0

    @model_validator(mode="after")
    def _heads_fit(self):
        for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads:
                raise ValueError(f"width {width} must be a multiple of its {heads} heads")
        return self


def blocks(width: int, depth: int, heads: int, mlp_ratio: float, eps: float = EPS) -> nn.ModuleList:
    """`depth` pre-norm transformer blocks, each (B, L, W) to (B, L, W)."""
    norm: Any = functools.partial(nn.LayerNorm, eps=eps)  # timm only calls it, but its annotation asks for a class
    return nn.ModuleList(Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))


def block_flops(width: int, tokens: int, mlp_ratio: float) -> int:
    """FLOPs (a multiply-add is 2) of one block's forward on one image of `tokens` tokens."""
    return int(2 * tokens * width * width * (4 + 2 * mlp_ratio) + 4 * tokens * tokens * width)


def initialise_linear(module: nn.Module) -> None:
    """Give every linear layer inside `module` Xavier-uniform weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of each row of `values` (B, L, ...) the entries `index` (B, N): (B, N, ...)."""
    shape = index.shape + (1,) * (values.dim() - 2)
    return values.gather(1, index.view(shape).expand(*index.shape, *values.shape[2:]))
