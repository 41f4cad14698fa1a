"""Inpainting networks of the Stable Diffusion kind (diffusers' UNet2DConditionModel), cut after the middle block.

The blocks are diffusers' own, so the two halves compute what the whole model computes, and tensors keep its names
behind `encoder.`, `decoder.` and `shared.`.
Shapes: B images, C latent channels, h x w latents, T tokens of the prompt, D their width, E width of the embedding of
time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unlearn.models.base import CheckpointedModule
from unlearn.models.diffusion.networks import PROMPT_TENSORS
from unlearn.models.diffusion.unet import renamed, set_checkpointing

from diffusers import UNet2DConditionModel  # isort: skip

# Part of our model -> the names of diffusers' submodules in it.
PARTS = {
    "encoder": ("conv_in", "down_blocks", "mid_block"),
    "decoder": ("up_blocks", "conv_norm_out", "conv_out"),
    "shared": ("time_embedding", "add_embedding"),
}
# Settings that change what the model must be given, with the values that Stable Diffusion 1, 2 and XL have.
_PLAIN = {
    "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None, "time_cond_proj_dim": None,
    "center_input_sample": False, "attention_type": "default",
}  # fmt: skip


class Conditioning(nn.Module):
    """(timesteps (B,), dtype, texts) to (embedding of time (B, E), prompt (B, T, D)): what encoder and decoder are
    given.

    texts: which of the K prompts each row has (B,); None: all the first. SDXL adds the pooled prompt (1, P) and six
    sizes in pixels (original, crop, target) to the embedding of time.
    """

    prompt: torch.Tensor
    pooled: torch.Tensor
    sizes: torch.Tensor

    def __init__(self, model: UNet2DConditionModel, tokens: int, image_size: int, texts: int):
        super().__init__()
        self.time_proj, self.time_embedding = model.time_proj, model.time_embedding
        self.time_embed_act = model.time_embed_act
        config = model.config
        width = config["cross_attention_dim"]
        self.register_buffer("prompt", torch.zeros(texts, tokens, width if isinstance(width, int) else width[0]))
        self.add_embedding = None
        if config["addition_embed_type"] == "text_time":
            self.add_time_proj, self.add_embedding = model.add_time_proj, model.add_embedding
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            self.register_buffer("pooled", torch.zeros(texts, pooled))
            sizes = torch.tensor([image_size, image_size, 0, 0, image_size, image_size])
            self.register_buffer("sizes", sizes, persistent=False)

    def forward(
        self, t: torch.Tensor, dtype: torch.dtype, texts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        emb = self.time_embedding(self.time_proj(t).to(dtype))
        if self.add_embedding is not None:
            pooled = rows(self.pooled, texts)
            sizes = self.add_time_proj(self.sizes).reshape(1, -1).expand(len(pooled), -1)
            emb = emb + self.add_embedding(torch.cat([pooled.to(dtype), sizes.to(dtype)], dim=1))
        emb = emb if self.time_embed_act is None else self.time_embed_act(emb)
        return emb, rows(self.prompt, texts).to(emb.dtype).expand(len(t), -1, -1)


def rows(prompts: torch.Tensor, texts: torch.Tensor | None) -> torch.Tensor:
    """Of prompts (K, ...) those of each row, (B, ...); the first alone, (1, ...), where `texts` is None."""
    return prompts[:1] if texts is None else prompts[texts]


def _call(block: nn.Module, sample: torch.Tensor, emb: torch.Tensor, context: torch.Tensor, **more):
    if getattr(block, "has_cross_attention", False):
        more["encoder_hidden_states"] = context
    return block(hidden_states=sample, temb=emb, **more)


class Encoder(CheckpointedModule):
    """(sample, emb, context) to levels: every skip in the order in which it is computed, then the middle."""

    def __init__(self, model: UNet2DConditionModel):
        super().__init__()
        self.conv_in, self.down_blocks = model.conv_in, model.down_blocks
        self.mid_block = model.get_submodule("mid_block")

    def forward(self, sample: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
        set_checkpointing(self, self.activation_checkpointing)
        sample = self.conv_in(sample)
        levels = [sample]
        for block in self.down_blocks:
            sample, skips = _call(block, sample, emb, context)
            levels.extend(skips)
        return [*levels, _call(self.mid_block, sample, emb, context)]


class Decoder(nn.Module):
    """(levels, emb, context) to the prediction (B, C, h, w)."""

    up_blocks: Any  # a ModuleList of blocks that have `resnets`

    def __init__(self, model: UNet2DConditionModel):
        super().__init__()
        self.up_blocks, self.conv_act, self.conv_out = model.up_blocks, model.get_submodule("conv_act"), model.conv_out
        self.conv_norm_out = model.get_submodule("conv_norm_out")

    def forward(self, levels: list[torch.Tensor], emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        *skips, sample = levels
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, own = skips[:-count], tuple(skips[-count:])
            # The size of the next skip, so that sides that cannot be halved evenly get their own size back.
            size = skips[-1].shape[2:] if skips else None
            sample = _call(block, sample, emb, context, res_hidden_states_tuple=own, upsample_size=size)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


def layout(noisy: torch.Tensor, known: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The encoder's sample (B, 2 C + 1, h, w): noisy latents, the hole, latents of the image with a grey hole.

    noisy, known: (B, C, h, w). hidden: (B, 1, S, S) pixels, true in the hole.
    """
    return torch.cat([noisy, F.interpolate(hidden.to(noisy.dtype), size=noisy.shape[2:]), known], dim=1)


def split(
    config: dict[str, Any], tokens: int = 77, image_size: int = 512, texts: int = 1
) -> tuple[Encoder, Decoder, Conditioning]:
    """The three parts of the network that diffusers builds from this config; dropout is left out. Raises ValueError.

    tokens: of a prompt. image_size: in pixels, an input of SDXL. texts: how many prompts there are.
    """
    whole = UNet2DConditionModel(**{**config, "dropout": 0.0})
    c = whole.config
    wrong = [f"{name} {c[name]!r}" for name, value in _PLAIN.items() if c[name] != value]
    if c["addition_embed_type"] not in (None, "text_time"):
        wrong.append(f"addition_embed_type {c['addition_embed_type']!r}")
    if whole.mid_block is None or whole.conv_norm_out is None:
        wrong.append(f"mid_block_type {c['mid_block_type']!r}, norm_num_groups {c['norm_num_groups']!r}")
    if wrong:
        raise ValueError(
            f"only a UNet2DConditionModel of the Stable Diffusion 1, 2 and XL kinds is known, not {', '.join(wrong)}"
        )
    return Encoder(whole), Decoder(whole), Conditioning(whole, tokens, image_size, texts)


def from_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' names to ours; unknown names are kept, so that filling the model reports them as unexpected."""
    return renamed(tensors, PARTS)


def to_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to diffusers'; only tensors of the network itself, neither the prompt nor the VAE."""
    public = {name: name.partition(".")[2] for name in tensors if name not in PROMPT_TENSORS}
    return {
        theirs: tensors[n] for n, theirs in public.items() if theirs.split(".")[0] in PARTS.get(n.partition(".")[0], ())
    }
