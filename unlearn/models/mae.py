"""Masked autoencoder (arXiv 2111.06377): a ViT that encodes visible patches, and a light ViT that fills in the rest.

Shapes: B images, V visible of L = G x G patches, P pixels a patch side, W encoder width, D decoder width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import nn

from unlearn.errors import WeightsError
from unlearn.models import base, vit, vitmae
from unlearn.models.vit import take
from unlearn.views import View


class MAEOptions(vit.ViTOptions):
    """Defaults are those of ViT-B/16."""

    decoder_width: int = 512
    patch_size: int = 16
    norm_eps: float = vit.EPS
    # whether the decoder was trained to predict each patch's pixels normalised by their own mean and deviation
    norm_pix_loss: bool = False

    @model_validator(mode="after")
    def _patches_fit(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        for width in (self.width, self.decoder_width):
            if width % 4:
                raise ValueError(
                    f"width {width} must be a multiple of 4: a quarter each for sine and cosine of row and column"
                )
        return self


def sincos_positions(width: int, grid: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions (1, 1 + grid², width); row 0, the class token's, is zero.

    The first half of the channels holds the column, the second the row, as in the public checkpoints.
    """
    frequency = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = [np.outer(position, frequency) for position in (column, row)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), table])).float()[None]


def patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 3, S, S) to (B, L, 3, P, P)."""
    b, c, s, _ = images.shape
    return images.view(b, c, s // size, size, s // size, size).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c, size, size)


def unpatch(values: torch.Tensor, size: int) -> torch.Tensor:
    """(B, L, 3, P, P) to (B, 3, S, S)."""
    b, count, c, _, _ = values.shape
    g = int(count**0.5)
    return values.view(b, g, g, c, size, size).permute(0, 3, 1, 4, 2, 5).reshape(b, c, g * size, g * size)


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, applied to patches already cut out: one matrix product."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return F.linear(values.flatten(2), self.weight.flatten(1), self.bias)


class Encoder(base.CheckpointedModule):
    """(images (B, 3, S, S), visible (B, V)) to tokens (B, 1 + V, W), the class token first."""

    pos_embed: torch.Tensor

    def __init__(self, o: MAEOptions):
        super().__init__()
        self.patch_size = o.patch_size
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(3, o.width, o.patch_size, o.patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, o.width))
        self.register_buffer("pos_embed", sincos_positions(o.width, o.image_size // o.patch_size))
        self.blocks = vit.blocks(o.width, o.depth, o.heads, o.mlp_ratio, o.norm_eps)
        self.norm = nn.LayerNorm(o.width, eps=o.norm_eps)

    def forward(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embed["proj"](take(patches(images, self.patch_size), visible))
        positions = self.pos_embed.to(tokens.dtype)  # DeepSpeed leaves buffers in float32
        tokens = tokens + take(positions[:, 1:].expand(len(images), -1, -1), visible)
        first = (self.cls_token + positions[:, :1]).to(tokens.dtype).expand(len(images), -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        for block in self.blocks:
            tokens = self.checkpointed(block, tokens)
        return self.norm(tokens)


class Decoder(nn.Module):
    """(tokens (B, 1 + V, W), view) to normalised pixels of every patch (B, L, 3, P, P)."""

    pos_embed: torch.Tensor

    def __init__(self, o: MAEOptions):
        super().__init__()
        self.patch_size = o.patch_size
        self.embed = nn.Linear(o.width, o.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, o.decoder_width))
        self.register_buffer("pos_embed", sincos_positions(o.decoder_width, o.image_size // o.patch_size))
        self.blocks = vit.blocks(o.decoder_width, o.decoder_depth, o.decoder_heads, o.mlp_ratio, o.norm_eps)
        self.norm = nn.LayerNorm(o.decoder_width, eps=o.norm_eps)
        self.pred = nn.Linear(o.decoder_width, o.patch_size**2 * 3)

    def forward(self, tokens: torch.Tensor, view: View) -> torch.Tensor:
        tokens = self.embed(tokens)
        masked = self.mask_token.to(tokens.dtype).expand(*view.hidden.shape, -1)
        # The visible tokens come first, then the masked ones; `places` sorts them by patch.
        places = torch.cat([view.visible, view.hidden], dim=1).argsort(dim=1)
        whole = take(torch.cat([tokens[:, 1:], masked], dim=1), places)
        tokens = torch.cat([tokens[:, :1], whole], dim=1) + self.pos_embed.to(whole.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        pixels = self.pred(self.norm(tokens))[:, 1:]
        # The last layer orders a patch's pixels by (row, column, channel).
        return pixels.unflatten(2, (self.patch_size, self.patch_size, 3)).permute(0, 1, 4, 2, 3)


class MaskedAutoencoder(base.Adapter):
    """The embedding compared is all output tokens, (B, 1 + V, W)."""

    family = "mae"
    Options = MAEOptions
    encoder_sees_hole = False
    variants = {
        "vit_base_patch16": {},
        "vit_large_patch16": {"width": 1024, "depth": 24, "heads": 16},
        "vit_huge_patch14": {"patch_size": 14, "width": 1280, "depth": 32, "heads": 16},
        "vit_nano_patch4_32": {
            "image_size": 32, "patch_size": 4, "width": 128, "depth": 6, "heads": 4,
            "decoder_width": 96, "decoder_depth": 3, "decoder_heads": 4,
        },
        "vit_micro_patch8_64": {
            "image_size": 64, "patch_size": 8, "width": 192, "depth": 6, "heads": 4,
            "decoder_width": 128, "decoder_depth": 3, "decoder_heads": 4,
        },
    }  # fmt: skip

    options: MAEOptions
    encoder: Encoder
    decoder: Decoder

    def __init__(self, options: MAEOptions):
        super().__init__(options)
        self.encoder = Encoder(options)
        self.decoder = Decoder(options)
        self._initialise()

    def _initialise(self):
        for layer in self.encoder.modules():
            if isinstance(layer, PatchProjection):
                nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))  # as the matrix that it is
        vit.initialise_linear(self)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    @property
    def grid(self) -> int:
        return self.options.image_size // self.options.patch_size

    def encode(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        return self.encoder(inputs, view.visible)

    def reconstruct(self, images: torch.Tensor, view: View) -> torch.Tensor:
        filled = unpatch(self.decoder(self.encode(images, view), view), self.options.patch_size)
        return torch.where(view.pixel_mask(images.shape[-1]), filled.to(images.dtype), images)

    def predict(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        """Pixels of the hidden patches, (B, H, 3, P, P)."""
        return take(self.decoder(self.encode(inputs, view), view), view.hidden)

    def targets(self, inputs: torch.Tensor, view: View, seed: int = 0) -> torch.Tensor:
        target = take(patches(inputs, self.options.patch_size), view.hidden)
        if self.options.norm_pix_loss:
            variance, mean = torch.var_mean(target.float(), dim=(2, 3, 4), keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target

    def loss(self, predictions: torch.Tensor, targets: torch.Tensor, view: View) -> torch.Tensor:
        """Mean squared error of the hidden patches, in normalised pixels."""
        return (predictions - targets).float().square().mean()

    def flops(self, view: View) -> int:
        o, visible = self.options, view.visible.shape[1]
        projection = 2 * visible * 3 * o.patch_size**2 * o.width
        return projection + o.depth * vit.block_flops(o.width, visible + 1, o.mlp_ratio)

    @classmethod
    def from_file(
        cls, tensors: dict[str, torch.Tensor], arguments: dict[str, Any], chosen: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """A file of facebookresearch/mae; those of its training say whether pixels were normalised by patch."""
        if any(name.startswith("vit.embeddings.") for name in tensors):
            raise WeightsError(
                "these weights have the names of transformers' ViTMAE: give their folder, with its config.json"
            )
        if "norm_pix_loss" in arguments:
            return cls.from_public(tensors), {"norm_pix_loss": bool(arguments["norm_pix_loss"])}
        if "norm_pix_loss" not in chosen and any(name.startswith("decoder_") for name in tensors):
            base.tell(
                "these weights of MAE do not say whether their decoder predicts plain pixels (mae_visualize_*) or "
                "pixels normalised by patch; plain ones are assumed: set model.options.norm_pix_loss to false or true"
            )
        return cls.from_public(tensors), None

    @classmethod
    def from_folder(
        cls, folder: Path, chosen: dict[str, Any], first_stage: Path | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return vitmae.read(folder)

    @classmethod
    def options_from_folder(
        cls, folder: Path, chosen: dict[str, Any], first_stage: Path | None = None
    ) -> dict[str, Any]:
        return vitmae.options(folder)

    def to_folder(self, folder: Path, origin: Path | None = None) -> str:
        vitmae.write(self, folder)
        return "transformers.ViTMAEForPreTraining.from_pretrained(FOLDER)"

    @classmethod
    def from_public(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The names of facebookresearch/mae: `decoder_*` and `mask_token` are the decoder's, the rest the encoder's."""
        if any(name.startswith("encoder.") for name in tensors):
            return tensors
        renamed = {}
        for name, tensor in tensors.items():
            if name == "mask_token" or name.startswith("decoder_"):
                renamed[f"decoder.{name.removeprefix('decoder_')}"] = tensor
            else:
                renamed[f"encoder.{name}"] = tensor
        return renamed
