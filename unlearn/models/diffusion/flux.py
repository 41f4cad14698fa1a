"""Inpainting transformers of the FLUX.1-Fill kind (diffusers' FluxTransformer2DModel), cut between two of their blocks.

The blocks follow one another: first those with two streams (image and text), then those with one. The first
`encoder_blocks` of them are the encoder. They are diffusers' own blocks, so the parts compute what the whole model
computes.
Shapes: B images, C latent channels, h x w latents, N = h/2 * w/2 image tokens, T tokens of the prompt, W width.
"""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unlearn.models.base import CheckpointedModule
from unlearn.models.diffusion.networks import PROMPT_TENSORS
from unlearn.models.diffusion.unet_condition import rows

from diffusers import FluxTransformer2DModel  # isort: skip

# Part of our model -> the names of diffusers' submodules in it, besides the blocks.
PARTS = {
    "encoder": ("x_embedder",),
    "decoder": ("norm_out", "proj_out"),
    "shared": ("time_text_embed", "context_embedder"),
}
BLOCK_KINDS = ("transformer_blocks", "single_transformer_blocks")  # in the order in which they are computed
GUIDANCE = 30.0  # the guidance strength that diffusers' FLUX.1-Fill pipeline gives by default
PACK = 2  # latents along each side of a token
_BLOCK = re.compile(rf"(?:encoder\.|decoder\.)?({'|'.join(BLOCK_KINDS)})\.(\d+)\.(.+)")


class Conditioning(nn.Module):
    """(timesteps (B,) in 0..1000, dtype, texts) to (emb of time, guidance and pooled prompt (B, W), prompt (B, T, W)).

    texts: which of the K prompts each row has (B,); None: all the first.
    """

    prompt: torch.Tensor
    pooled: torch.Tensor

    def __init__(self, whole: FluxTransformer2DModel, tokens: int, texts: int):
        super().__init__()
        self.time_text_embed, self.context_embedder = whole.time_text_embed, whole.context_embedder
        self.guided, self.guidance = whole.config["guidance_embeds"], GUIDANCE
        self.register_buffer("prompt", torch.zeros(texts, tokens, whole.config["joint_attention_dim"]))
        self.register_buffer("pooled", torch.zeros(texts, whole.config["pooled_projection_dim"]))

    def forward(
        self, t: torch.Tensor, dtype: torch.dtype, texts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # diffusers' model is given t / 1000 and multiplies by 1000; doing both keeps its rounding.
        t = t.float() / 1000 * 1000
        pooled = rows(self.pooled, texts).to(dtype).expand(len(t), -1)
        guidance = (torch.full_like(t, self.guidance * 1000),) if self.guided else ()
        emb = self.time_text_embed(t, *guidance, pooled)
        return emb, self.context_embedder(rows(self.prompt, texts).to(dtype)).expand(len(t), -1, -1)


def guide(shared: Conditioning, scale: float) -> None:
    """Let the network be told another guidance strength than GUIDANCE: Flux needs no second prediction for it."""
    shared.guidance = scale


class Blocks(CheckpointedModule):
    """The blocks number start .. stop, in the modules and under the numbers that they have in diffusers' model."""

    def __init__(self, whole: FluxTransformer2DModel, start: int, stop: int):
        super().__init__()
        self.pos_embed = whole.pos_embed
        every = [(kind, str(n), block) for kind in BLOCK_KINDS for n, block in enumerate(getattr(whole, kind))]
        for name in BLOCK_KINDS:
            self.add_module(name, nn.ModuleDict({n: block for kind, n, block in every[start:stop] if kind == name}))

    def run(self, image: torch.Tensor, text: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(image (B, N, W), text (B, T, W)) after the blocks."""
        rotary = self.pos_embed(_positions(text.shape[1], image.shape[1], image.device))
        for block in (block for kind in BLOCK_KINDS for block in getattr(self, kind).values()):
            text, image = self.checkpointed(block, image, text, emb, rotary)
        return image, text


class Encoder(Blocks):
    """(sample (B, K, h, w), emb, context) to one level: the tokens after the last block, text first, (B, T + N, W)."""

    def __init__(self, whole: FluxTransformer2DModel, stop: int):
        super().__init__(whole, 0, stop)
        self.x_embedder = whole.x_embedder

    def forward(self, sample: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
        image, text = self.run(self.x_embedder(pack(sample)), context, emb)
        return [torch.cat([text, image], dim=1)]


class Decoder(Blocks):
    """(levels, emb, context) to the prediction (B, C, h, w); only the length of the context is used."""

    def __init__(self, whole: FluxTransformer2DModel, start: int):
        super().__init__(whole, start, len(whole.transformer_blocks) + len(whole.single_transformer_blocks))
        self.norm_out, self.proj_out = whole.norm_out, whole.proj_out

    def forward(self, levels: list[torch.Tensor], emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        text, image = levels[0].tensor_split([context.shape[1]], dim=1)
        image, _ = self.run(image, text, emb)
        return unpack(self.proj_out(self.norm_out(image, emb)))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, K, h, w) to tokens of 2 x 2 latents (B, N, 4 K)."""
    return F.pixel_unshuffle(latents, PACK).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`, for square images."""
    side = math.isqrt(tokens.shape[1])
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), PACK)


def _positions(text: int, image: int, device: torch.device) -> torch.Tensor:
    """(T + N, 3): (0, row, column) of every token of a square image; (0, 0, 0) for those of the text."""
    side = math.isqrt(image)
    steps = torch.arange(side, device=device)
    row, column = steps.repeat_interleave(side), steps.repeat(side)
    return F.pad(torch.stack([torch.zeros_like(row), row, column], dim=1), (0, 0, text, 0))


def layout(noisy: torch.Tensor, known: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The encoder's sample (B, 2 C + f², h, w): noisy latents, latents of the image with a grey hole, every pixel of
    the hole.

    noisy, known: (B, C, h, w). hidden: (B, 1, f h, f w) pixels, true in the hole.
    """
    return torch.cat(
        [noisy, known, F.pixel_unshuffle(hidden.to(noisy.dtype), hidden.shape[-1] // noisy.shape[-1])], dim=1
    )


def split(
    config: dict[str, Any], tokens: int = 512, encoder_blocks: int | None = None, texts: int = 1
) -> tuple[Encoder, Decoder, Conditioning]:
    """The three parts of the network that diffusers builds from this config. Raises ValueError.

    tokens: of a prompt. encoder_blocks: how many blocks the encoder has, by default half of them. texts: how many
    prompts there are.
    """
    if config.get("patch_size", 1) != 1:
        raise ValueError(f"patch_size {config['patch_size']}: only 1 is known, as FLUX.1-Fill has it")
    whole = FluxTransformer2DModel(**config)
    count = len(whole.transformer_blocks) + len(whole.single_transformer_blocks)
    stop = count // 2 if encoder_blocks is None else encoder_blocks
    if not 0 < stop < count:
        raise ValueError(
            f"encoder_blocks {stop}: of the {count} blocks some must be the encoder's and some the decoder's"
        )
    return Encoder(whole, stop), Decoder(whole, stop), Conditioning(whole, tokens, texts)


def from_public(tensors: dict[str, torch.Tensor], encoder_blocks: int | None = None) -> dict[str, torch.Tensor]:
    """diffusers' names, or ours of another cut, to ours; unknown ones stay, so that filling the model reports them."""
    matches = {name: _BLOCK.fullmatch(name) for name in tensors}
    numbers = {(BLOCK_KINDS.index(match[1]), int(match[2])) for match in matches.values() if match}
    stop = len(numbers) // 2 if encoder_blocks is None else encoder_blocks
    of_encoder = set(sorted(numbers)[:stop])
    part = {word: name for name, words in PARTS.items() for word in words}
    renamed = {}
    for name, match in matches.items():
        if match:
            side = "encoder" if (BLOCK_KINDS.index(match[1]), int(match[2])) in of_encoder else "decoder"
            renamed[f"{side}.{match[1]}.{match[2]}.{match[3]}"] = tensors[name]
        else:
            side = part.get(name.split(".")[0])
            renamed[f"{side}.{name}" if side else name] = tensors[name]
    return renamed


def to_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to diffusers'; only tensors of the network itself, neither the prompt nor the VAE."""
    public = {name: name.partition(".")[2] for name in tensors if name not in PROMPT_TENSORS}
    words = {part: (*words, *BLOCK_KINDS) for part, words in PARTS.items()}
    return {
        theirs: tensors[n] for n, theirs in public.items() if theirs.split(".")[0] in words.get(n.partition(".")[0], ())
    }
