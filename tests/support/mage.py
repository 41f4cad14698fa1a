"""MAGE and its tokenizer once more, written plainly from the papers and the public layouts: numpy, float64, one image,
tensors by their public names."""

import math

import numpy as np
import torch

from support.models import block_names
from unlearn import config, views
from unlearn.models import weights
from unlearn.models.mage import MaskedGenerativeEncoder

SIDE, GRID, CODES, WIDTH, INNER, LATENT = 16, 4, 12, 16, 24, 6
VOCABULARY, CLASS = CODES + 9, CODES + 3
CHANNELS, LAYERS, GROUPS = (4, 4, 8), 2, 2
MEAN, STD = np.array([0.5, 0.375, 0.25]).reshape(3, 1, 1), np.array([0.1875, 0.3125, 0.25]).reshape(3, 1, 1)
SMALL = {
    "image_size": SIDE, "width": WIDTH, "depth": 2, "heads": 2, "decoder_width": INNER, "decoder_depth": 1,
    "decoder_heads": 2,
    "codes": CODES, "code_width": LATENT, "vocabulary": VOCABULARY, "class_token": CLASS, "channels": CHANNELS,
    "layers": LAYERS,
    "norm_groups": GROUPS, "mean": MEAN.ravel().tolist(), "std": STD.ravel().tolist(),
}  # fmt: skip
DIFFUSERS = SMALL | {"tokenizer": "diffusers", "latent_channels": 5}


def build(options: dict = SMALL, **model) -> MaskedGenerativeEncoder:
    return weights.build(config.Model(family="mage", options=options, **model), 1)


def draw(kind: str = "random", size: float = 0.5, rows: int = 2) -> views.View:
    return views.draw([config.ViewSpec(kind=kind, size=size)], GRID, rows, np.random.default_rng(0))


def pictures(rows: int = 2, seed: int = 1) -> torch.Tensor:
    """Normalised images whose pixels lie in [0, 1]."""
    pixels = torch.rand(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (pixels - torch.from_numpy(MEAN)) / torch.from_numpy(STD)


def layer_norm(x: np.ndarray, w: dict, name: str, eps: float = 1e-6) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def block(x: np.ndarray, w: dict, name: str, heads: int) -> np.ndarray:
    width = x.shape[1]
    qkv = linear(layer_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv")
    parts = []
    for head in range(heads):
        q, k, v = (qkv[:, n * width :][:, head * width // heads : (head + 1) * width // heads] for n in range(3))
        weight = np.exp(q @ k.T / math.sqrt(width / heads))
        parts.append(weight / weight.sum(1, keepdims=True) @ v)
    x = x + linear(np.concatenate(parts, axis=1), w, f"{name}.attn.proj")
    return x + linear(gelu(linear(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")), w, f"{name}.mlp.fc2")


def encoded(w: dict, tokens: np.ndarray, visible: list[int]) -> np.ndarray:
    """(1 + V, W): BERT's embedding of the class token and the visible ones, blocks, norm."""
    words, places = w["token_emb.word_embeddings.weight"], w["token_emb.position_embeddings.weight"]
    x = np.array([words[CLASS] + places[0]] + [words[tokens[i]] + places[1 + i] for i in visible])
    x = layer_norm(x, w, "token_emb.LayerNorm")
    for i in range(SMALL["depth"]):
        x = block(x, w, f"blocks.{i}", SMALL["heads"])
    return layer_norm(x, w, "norm")


def logits(w: dict, embedding: np.ndarray, visible: list[int]) -> np.ndarray:
    """(L, vocabulary): the class token stands in for what is not seen, and the words are those of the encoder."""
    x = linear(embedding, w, "decoder_embed")
    whole = np.array([x[0]] + [x[1 + visible.index(i)] if i in visible else x[0] for i in range(GRID * GRID)])
    whole = whole + w["decoder_pos_embed_learned"][0]
    for i in range(SMALL["decoder_depth"]):
        whole = block(whole, w, f"decoder_blocks.{i}", SMALL["decoder_heads"])
    whole = gelu(linear(layer_norm(whole, w, "decoder_norm"), w, "mlm_layer.fc"))
    words = (
        layer_norm(whole, w, "mlm_layer.ln", 1e-5) @ w["token_emb.word_embeddings.weight"].T + w["mlm_layer.bias"][0]
    )
    return words[1:]


def conv(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    """A convolution that keeps the size, of (C, H, W)."""
    kernel = w[f"{name}.weight"]
    reach = kernel.shape[2] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    out = np.zeros((len(kernel), *x.shape[1:]))
    for dy in range(kernel.shape[2]):
        for dx in range(kernel.shape[3]):
            out += np.einsum("oc,chw->ohw", kernel[:, :, dy, dx], padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]])
    return out + w.get(f"{name}.bias", np.zeros(len(kernel)))[:, None, None]


def active(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    """Group norm, then swish."""
    grouped = x.reshape(GROUPS, -1)
    grouped = (grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-6)
    x = grouped.reshape(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
    return x / (1 + np.exp(-x))


def residual(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    h = conv(active(x, w, f"{name}.norm1"), w, f"{name}.conv1")
    h = conv(active(h, w, f"{name}.norm2"), w, f"{name}.conv2")
    return h + (conv(h, w, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in w else x)


def latents_of(w: dict, pixels: np.ndarray) -> np.ndarray:
    """(L, C) of pixels (3, S, S) in [0, 1]."""
    x = conv(pixels, w, "encoder.conv_in")
    for level in range(len(CHANNELS)):
        for i in range(LAYERS):
            x = residual(x, w, f"encoder.down.{level}.block.{i}")
        if level < len(CHANNELS) - 1:
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    for i in (1, 2):
        x = residual(x, w, f"encoder.mid.block_{i}")
    return conv(active(x, w, "encoder.norm_out"), w, "encoder.conv_out").reshape(LATENT, -1).T


def tokens_of(w: dict, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (L,), by how much the nearest code is nearer than the next)."""
    apart = ((latents_of(w, pixels)[:, None] - w["quantize.embedding.weight"]) ** 2).sum(2)
    ordered = np.sort(apart, axis=1)
    return apart.argmin(1), ordered[:, 1] - ordered[:, 0]


def painted(w: dict, tokens: np.ndarray) -> np.ndarray:
    """Pixels (3, S, S) of tokens (L,)."""
    x = conv(w["quantize.embedding.weight"][tokens].T.reshape(LATENT, GRID, GRID), w, "decoder.conv_in")
    for i in (1, 2):
        x = residual(x, w, f"decoder.mid.block_{i}")
    for level in reversed(range(len(CHANNELS))):
        for i in range(LAYERS):
            x = residual(x, w, f"decoder.up.{level}.block.{i}")
        if level:
            x = conv(x.repeat(2, 1).repeat(2, 2), w, f"decoder.up.{level}.upsample.conv")
    return conv(active(x, w, "decoder.norm_out"), w, "decoder.conv_out")


def tokenizer_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the public tokenizer, for the small shape."""
    names = {
        "encoder.conv_in.weight": (CHANNELS[0], 3, 3, 3), "encoder.conv_out.weight": (LATENT, CHANNELS[-1], 1, 1),
        "encoder.conv_out.bias": (LATENT,),
        "decoder.conv_in.weight": (CHANNELS[-1], LATENT, 3, 3), "decoder.conv_in.bias": (CHANNELS[-1],),
        "decoder.conv_out.weight": (3, CHANNELS[0], 3, 3), "decoder.conv_out.bias": (3,),
        "quantize.embedding.weight": (CODES, LATENT),
    }  # fmt: skip
    norms = {"encoder.norm_out": CHANNELS[-1], "decoder.norm_out": CHANNELS[0]}
    blocks = {f"{part}.mid.block_{i}": (CHANNELS[-1], CHANNELS[-1]) for part in ("encoder", "decoder") for i in (1, 2)}
    for level, width in enumerate(CHANNELS):
        below, above = CHANNELS[max(level - 1, 0)], CHANNELS[min(level + 1, len(CHANNELS) - 1)]
        for i in range(LAYERS):
            blocks[f"encoder.down.{level}.block.{i}"] = (width if i else below, width)
            blocks[f"decoder.up.{level}.block.{i}"] = (width if i else above, width)
        if level:
            names |= {
                f"decoder.up.{level}.upsample.conv.weight": (width, width, 3, 3),
                f"decoder.up.{level}.upsample.conv.bias": (width,),
            }
    for name, (inside, outside) in blocks.items():
        norms |= {f"{name}.norm1": inside, f"{name}.norm2": outside}
        names |= {f"{name}.conv1.weight": (outside, inside, 3, 3), f"{name}.conv2.weight": (outside, outside, 3, 3)}
        names |= {f"{name}.nin_shortcut.weight": (outside, outside, 1, 1)} if inside != outside else {}
    return names | {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}


def mage_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of LTH14/mage without its tokenizer; what its code never uses is there too."""
    tokens = 1 + GRID * GRID
    names = {
        "token_emb.word_embeddings.weight": (VOCABULARY, WIDTH),
        "token_emb.position_embeddings.weight": (tokens, WIDTH),
        "token_emb.LayerNorm.weight": (WIDTH,), "token_emb.LayerNorm.bias": (WIDTH,), "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "decoder_embed.weight": (INNER, WIDTH), "decoder_embed.bias": (INNER,),
        "decoder_pos_embed_learned": (1, tokens, INNER),
        "decoder_norm.weight": (INNER,), "decoder_norm.bias": (INNER,), "mlm_layer.fc.weight": (WIDTH, INNER),
        "mlm_layer.fc.bias": (WIDTH,),
        "mlm_layer.ln.weight": (WIDTH,), "mlm_layer.ln.bias": (WIDTH,), "mlm_layer.bias": (1, 1, VOCABULARY),
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, tokens, WIDTH), "mask_token": (1, 1, INNER),
        "decoder_pos_embed": (1, tokens, INNER),
        "patch_embed.proj.weight": (WIDTH, 3, 4, 4), "patch_embed.proj.bias": (WIDTH,),
        "decoder_pred.weight": (48, INNER), "decoder_pred.bias": (48,),
    }  # fmt: skip
    for prefix, w, depth in (("blocks", WIDTH, SMALL["depth"]), ("decoder_blocks", INNER, SMALL["decoder_depth"])):
        for i in range(depth):
            names |= block_names(f"{prefix}.{i}", w)
    return names


def randoms(names: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in names.items()}


def double(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}
