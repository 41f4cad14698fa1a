"""MAGE (arXiv 2211.09117): a VQ-GAN tokenizer, a ViT that encodes visible tokens, and one that predicts hidden ones.

Shapes: B images, V visible of L = G x G tokens, W encoder width, D decoder width, N codes.
"""

import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import nn

from unlearn.models import base, mage_file, tokenizer, vit
from unlearn.models.vit import take
from unlearn.views import View

SMOOTHING = 0.1  # of labels, as MAGE was trained
NOISE_IMAGES = 256  # images of noise whose tokens the noise is drawn from


class MAGEOptions(vit.ViTOptions):
    """Defaults are those of MAGE's ViT-B.

    codes, code_width: of the tokenizer's codebook. vocabulary: how many tokens have an embedding: the codes first, then
    others; the last one is unused here. class_token: the token at the place of the class. tokenizer: its architecture,
    see unlearn.models.tokenizer. channels: of the tokenizer's levels; each level but the last halves the side. layers:
    residual blocks of a level. latent_channels, mid_attention: of a `diffusers` tokenizer only. decoding_steps: of
    `reconstruct`. temperature: as MAGE's (4.5 there): tokens are drawn from their distribution, and which
        are kept is decided with Gumbel noise of this strength, less from round to round. 0: no randomness at all, the
        likeliest tokens.
    train_words: whether unlearning trains the token embedding. In MAGE's own code the decoder's head is the same
    tensor: a
        model is written back for it only where the embedding has stayed as it was.
    """

    image_size: int = 256
    codes: int = 1024
    code_width: int = 256
    vocabulary: int = 1024 + 1000 + 1
    class_token: int = 1100
    tokenizer: Literal["mage", "diffusers"] = "mage"
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    layers: int = 2
    norm_groups: int = 32
    latent_channels: int = 256
    mid_attention: bool = True
    decoding_steps: int = 8
    temperature: float = 0.0
    train_words: bool = True

    @property
    def grid(self) -> int:
        return self.image_size >> (len(self.channels) - 1)

    @model_validator(mode="after")
    def _tokens_fit(self):
        if not self.channels or any(width < 1 or width % self.norm_groups for width in self.channels):
            raise ValueError(f"channels {self.channels} must be multiples of norm_groups {self.norm_groups}")
        patch = 1 << (len(self.channels) - 1)
        if self.image_size % patch:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {patch}, the side of one of the tokenizer's codes"
            )
        if not self.codes <= self.class_token < self.vocabulary:
            raise ValueError(
                f"class_token {self.class_token} must lie after the {self.codes} codes, in the vocabulary of "
                f"{self.vocabulary}"
            )
        if self.decoding_steps < 1 or self.temperature < 0:
            raise ValueError("decoding_steps must be 1 or more, temperature 0 or more")
        return self


class Encoder(base.CheckpointedModule):
    """(tokens (B, L), visible (B, V)) to (B, 1 + V, W), the class token first; hidden tokens are not looked at."""

    def __init__(self, o: MAGEOptions):
        super().__init__()
        self.class_token = o.class_token
        self.word_embeddings = nn.Embedding(o.vocabulary, o.width)
        self.position_embeddings = nn.Embedding(1 + o.grid**2, o.width)
        self.embed_norm = nn.LayerNorm(o.width, eps=vit.EPS)
        self.blocks = vit.blocks(o.width, o.depth, o.heads, o.mlp_ratio)
        self.norm = nn.LayerNorm(o.width, eps=vit.EPS)

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        # The class token goes before the others, at position 0.
        words = F.pad(take(tokens, visible), (1, 0), value=self.class_token)
        x = self.embed_norm(self.word_embeddings(words) + self.position_embeddings(F.pad(visible + 1, (1, 0))))
        for block in self.blocks:
            x = self.checkpointed(block, x)
        return self.norm(x)


class Decoder(nn.Module):
    """(embedding (B, 1 + V, W), visible (B, V)) to the logits of the token at every place, (B, L, vocabulary).

    MAGE's logits are products with the encoder's token embedding. Here `head` is a copy of that embedding, so that
    training the encoder does not change the decoder. The tokenizer's own decoder, from codes to pixels, is here too and
    never trained together with the rest.
    """

    def __init__(self, o: MAGEOptions):
        super().__init__()
        self.grid = o.grid
        self.embed = nn.Linear(o.width, o.decoder_width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + o.grid**2, o.decoder_width))
        self.blocks = vit.blocks(o.decoder_width, o.decoder_depth, o.decoder_heads, o.mlp_ratio)
        self.norm = nn.LayerNorm(o.decoder_width, eps=vit.EPS)
        self.fc = nn.Linear(o.decoder_width, o.width)
        self.ln = nn.LayerNorm(o.width)
        self.head = nn.Linear(o.width, o.vocabulary)
        self.codebook = nn.Embedding(o.codes, o.code_width)
        self.post_quant_conv = tokenizer.projection(o, o.code_width, o.latent_channels)
        self.pixels = tokenizer.decoder(o)
        self.range = tokenizer.Range(o)

    def forward(self, embedding: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        x = self.embed(embedding)
        # The class token stands at the hidden places.
        whole = x[:, :1].expand(-1, self.grid**2, -1)
        whole = whole.scatter(1, visible[..., None].expand(-1, -1, x.shape[2]), x[:, 1:])
        x = torch.cat([x[:, :1], whole], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(F.gelu(self.fc(self.norm(x)[:, 1:]))))

    def paint(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, C, G, G) to normalised images (B, 3, S, S)."""
        return self.range.inverse(self.pixels(self.post_quant_conv(codes)))


class MaskedGenerativeEncoder(base.Adapter):
    """Inputs are tokens, int64 (B, 2, L): see Tokenizer. The embedding compared is all output tokens, (B, 1 + V, W)."""

    family = "mage"
    Options = MAGEOptions
    encoder_sees_hole = False
    continuous = False
    first_stage_names = tokenizer.TOKENIZER_TENSORS
    variants = {
        "mage_vit_base": {},
        "mage_vit_large": {"width": 1024, "depth": 24, "heads": 16, "decoder_width": 1024},
        "mage_nano_32": {
            "image_size": 32, "width": 96, "depth": 4, "heads": 4, "decoder_width": 64, "decoder_depth": 2,
            "decoder_heads": 4, "codes": 256, "code_width": 16, "vocabulary": 257, "class_token": 256,
            "channels": (8, 16, 32), "layers": 1, "norm_groups": 4,
        },
        "mage_micro_64": {
            "image_size": 64, "width": 192, "depth": 6, "heads": 4, "decoder_width": 128, "decoder_depth": 3,
            "decoder_heads": 4, "codes": 512, "code_width": 32, "vocabulary": 513, "class_token": 512,
            "channels": (16, 32, 64, 64), "layers": 1, "norm_groups": 8,
        },
    }  # fmt: skip

    options: MAGEOptions
    encoder: Encoder
    decoder: Decoder
    first_stage: tokenizer.Tokenizer

    def __init__(self, options: MAGEOptions):
        super().__init__(options)
        self.first_stage = tokenizer.Tokenizer(options)
        self.encoder = Encoder(options)
        self.decoder = Decoder(options)
        self._noise_tokens: torch.Tensor | None = None
        self._initialise()

    def _initialise(self):
        encoder, decoder = self.encoder, self.decoder
        vit.initialise_linear(encoder)
        vit.initialise_linear(decoder)
        for weight in (
            encoder.word_embeddings.weight,
            encoder.position_embeddings.weight,
            decoder.pos_embed,
            decoder.head.weight,
        ):
            nn.init.normal_(weight, std=0.02)
        encoder.word_embeddings.requires_grad_(self.options.train_words)
        for part in self._tokenizer_parts():
            part.requires_grad_(False)
        # Codes that start far from all latents would not be used for a long time.
        nn.init.normal_(self.first_stage.codebook.weight, std=0.1)
        self.decoder.codebook.weight.copy_(self.first_stage.codebook.weight)

    def _tokenizer_parts(self) -> tuple[nn.Module, ...]:
        return self.first_stage, self.decoder.codebook, self.decoder.post_quant_conv, self.decoder.pixels

    @property
    def grid(self) -> int:
        return self.options.grid

    def encode(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        return self.encoder(inputs[:, 0], view.visible)

    def predict(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """Logits of the hidden tokens, (B, H, vocabulary), given the visible ones of the image with its hole."""
        return take(self.decoder(self.encode(inputs, view), view.visible), view.hidden)

    def targets(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """The hidden tokens of the whole image, (B, H)."""
        return take(inputs[:, 1], view.hidden)

    def loss(self, predictions: torch.Tensor, targets: torch.Tensor, view: View) -> torch.Tensor:
        """Cross entropy of the hidden tokens."""
        return F.cross_entropy(predictions.float().flatten(0, 1), targets.flatten(), label_smoothing=SMOOTHING)

    def fill_hole(self, inputs: torch.Tensor, noise: torch.Tensor, view: View) -> torch.Tensor:
        """The tokens, with those of `noise` at the hidden places."""
        hidden = view.hidden[:, None].expand(-1, inputs.shape[1], -1)
        return inputs.scatter(2, hidden, noise.gather(2, hidden))

    def reconstruct(self, images: torch.Tensor, view: View) -> torch.Tensor:
        tokens = self.complete(self.inputs(images, view)[:, 0], view)
        codes = self.decoder.codebook(tokens).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        filled = self.decoder.paint(codes)
        return torch.where(view.pixel_mask(images.shape[-1]), filled.to(images.dtype), images)

    def complete(self, tokens: torch.Tensor, view: View) -> torch.Tensor:
        """Tokens (B, L) with the hidden ones predicted, in `decoding_steps` rounds (MaskGIT, arXiv 2202.04200).

        Each round keeps the tokens it is most certain of, few at first, and the next round sees them.
        """
        o, known, hidden = self.options, view.visible, view.hidden.shape[1]
        generator = torch.Generator().manual_seed(0)
        seen = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, known, True)
        for step in range(min(o.decoding_steps, hidden)):
            done = (step + 1) / min(o.decoding_steps, hidden)
            logits = self.decoder(self.encoder(tokens, known), known)[..., : o.codes].float()
            # One draw for all rows, so that an image is completed alike in any batch.
            noise = _gumbel((self.grid**2, o.codes), generator).to(logits.device)
            # The largest of logits with Gumbel noise is a draw from their distribution.
            chosen = (logits + noise if o.temperature else logits).argmax(2)
            certainty = logits.log_softmax(2).gather(2, chosen[..., None])[..., 0]
            noise = _gumbel((self.grid**2,), generator).to(logits.device)
            certainty = certainty + o.temperature * (1 - done) * noise
            tokens = torch.where(seen, tokens, chosen)
            left = min(math.floor(hidden * math.cos(math.pi / 2 * done)), hidden - step - 1) if done < 1 else 0
            ranked = certainty.masked_fill(seen, torch.inf).argsort(dim=1, descending=True, stable=True)
            known = ranked[:, : tokens.shape[1] - left]
            seen = torch.zeros_like(seen).scatter(1, known, True)
        return tokens

    def noise_like(self, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Tokens of images of standard Gaussian noise, drawn from those that `stock_noise` has made."""
        if self._noise_tokens is None:
            raise RuntimeError("no tokens of noise are in stock: call stock_noise with the first stage first")
        tokens = self._noise_tokens
        rows = torch.randint(len(tokens), (len(inputs),), generator=generator, device=tokens.device)
        return tokens[rows].expand(-1, 2, -1)

    @torch.no_grad()
    def stock_noise(self, first_stage: nn.Module, seed: int) -> None:
        """Make the tokens of NOISE_IMAGES images of noise, (NOISE_IMAGES, 1, L): the same on any device."""
        assert isinstance(first_stage, tokenizer.Tokenizer)
        generator, side = torch.Generator().manual_seed(seed), self.options.image_size
        device = first_stage.codebook.weight.device
        batches = (torch.randn(16, 3, side, side, generator=generator).to(device) for _ in range(NOISE_IMAGES // 16))
        self._noise_tokens = torch.cat([first_stage.tokens(images) for images in batches])[:, None]

    def first_stage_parameters(self) -> list[nn.Parameter]:
        return [p for part in self._tokenizer_parts() for p in part.requires_grad_(True).parameters()]

    def first_stage_loss(self, images: torch.Tensor) -> torch.Tensor:
        return tokenizer.loss(self.first_stage, self.decoder, images)

    def flops(self, view: View) -> int:
        o = self.options
        return o.depth * vit.block_flops(o.width, view.visible.shape[1] + 1, o.mlp_ratio)

    def to_folder(self, folder: Path, origin: Path | None = None) -> str:
        return mage_file.write(self.state_dict(), self.options, folder)

    @classmethod
    def first_stage_from(cls, path: Path) -> dict[str, torch.Tensor]:
        return tokenizer.read(path)

    @classmethod
    def from_public(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return mage_file.from_public(tensors)


def _gumbel(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Samples of the standard Gumbel distribution."""
    return -torch.empty(shape).exponential_(generator=generator).clamp_min(1e-20).log()
