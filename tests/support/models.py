"""A small shape of every family, and micro-batches for it."""

import dataclasses

import numpy as np
import torch

from unlearn import config, views
from unlearn.data.loader import Batch
from unlearn.models import base, weights

TINY = {
    "image_size": 32, "patch_size": 8, "width": 16, "depth": 2, "heads": 2,
    "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
# Small shapes of each family: name -> (shape, options). A family without one fails here.
SMALL = {
    "mae": ("mae", TINY),
    "mage": ("mage", {
        "image_size": 32, "width": 16, "depth": 2, "heads": 2, "decoder_width": 8, "decoder_depth": 1,
        "decoder_heads": 2,
        "codes": 16, "code_width": 4, "vocabulary": 18, "class_token": 16, "channels": (4, 4, 8, 8), "layers": 1,
        "norm_groups": 2,
    }),
    "diffusion_pixel": ("diffusion", {
        "image_size": 32, "grid": 8, "sampling_steps": 2, "network": {
            "class": "UNet2DModel", "in_channels": 6, "out_channels": 3, "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": 8, "norm_num_groups": 4,
        },
    }),
    "diffusion_latent": ("diffusion", {
        "image_size": 32, "grid": 4, "sampling_steps": 2, "tokens": 3,
        "vae": {"class": "TAEF2", "width": 8, "latent_channels": 4},
        "network": {
            "class": "UNet2DConditionModel", "in_channels": 9, "out_channels": 4, "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 4, "norm_num_groups": 4, "cross_attention_dim": 12,
        },
    }),
    "diffusion_flux": ("diffusion", {
        "image_size": 32, "grid": 4, "sampling_steps": 2, "tokens": 3, "encoder_blocks": 2, "scheduler": {"shift": 3.0},
        "vae": {
            "class": "AutoencoderTiny", "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
            "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1],
        },
        "network": {
            "class": "FluxTransformer2DModel", "in_channels": 48, "out_channels": 16, "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10,
            "guidance_embeds": True, "axes_dims_rope": [2, 2, 4],
        },
    }),
    "migan": ("migan", {"image_size": 16, "resolution": 32, "channel_base": 128, "channel_max": 16, "grid": 4}),
}  # fmt: skip
RETAIN, FORGET = 3, 2


def build(shape: str, seed: int = 1) -> base.Adapter:
    family, options = SMALL[shape]
    return weights.build(config.Model(family=family, options=options), seed)


def batch_for(model: base.Adapter, rows: int = RETAIN + FORGET, kind: str = "random", size: float = 0.6) -> Batch:
    side = model.options.image_size
    pixels = torch.randint(0, 256, (rows, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    view = views.draw([config.ViewSpec(kind=kind, size=size)], model.grid, rows, np.random.default_rng(0))
    return Batch(model.normalise(pixels), view, RETAIN, 5)


def embed(model: base.Adapter, batch: Batch, seed: int = 0) -> list[torch.Tensor]:
    """Levels of the embedding of a batch of normalised images."""
    return levels(model.encode(model.inputs(batch.images, batch.view), batch.view, seed))


def cached(model: base.Adapter, batch: Batch) -> Batch:
    """The batch as methods see it, and the model without its first_stage."""
    with torch.no_grad():
        inputs = model.inputs(batch.images, batch.view)
    if model.first_stage is not None:
        model.stock_noise(model.take_first_stage(torch.device("cpu")), 0)
    return dataclasses.replace(batch, images=inputs)


def levels(embedding: base.Embedding) -> list[torch.Tensor]:
    return [embedding] if isinstance(embedding, torch.Tensor) else embedding


def block_names(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer block as timm has it, which the public checkpoints of MAE and MAGE follow."""
    shapes = {
        "norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
        "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
    }  # fmt: skip
    return {
        f"{prefix}.{name}.{part}": full for name, shape in shapes.items()
        for part, full in (("weight", shape), ("bias", shape[:1]))
    }  # fmt: skip
