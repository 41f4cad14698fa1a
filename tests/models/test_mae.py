"""The masked autoencoder against an implementation of its own, written plainly from the paper and the public layout."""

import argparse
import math

import numpy as np
import pytest
import torch
from support.models import TINY, block_names

from unlearn import config, views
from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, weights
from unlearn.models.mae import MaskedAutoencoder

GRID, PATCH, SIDE = 4, TINY["patch_size"], TINY["image_size"]


def positions(width: int, grid: int) -> np.ndarray:
    """(1 + grid², width): sine and cosine of the column, then of the row; zero for the class token."""
    table = np.zeros((1 + grid * grid, width))
    for y in range(grid):
        for x in range(grid):
            for half, position in enumerate((x, y)):
                for i in range(width // 4):
                    angle = position / 10000 ** (i / (width / 4))
                    table[1 + y * grid + x, half * width // 2 + i] = math.sin(angle)
                    table[1 + y * grid + x, half * width // 2 + width // 4 + i] = math.cos(angle)
    return table


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def block(x: np.ndarray, w: dict, name: str, heads: int) -> np.ndarray:
    """One pre-norm transformer block on tokens (N, W)."""
    width = x.shape[1]
    qkv = (
        layer_norm(x, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"]) @ w[f"{name}.attn.qkv.weight"].T
        + w[f"{name}.attn.qkv.bias"]
    )
    q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    mixed = np.zeros_like(x)
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(width / heads))
        mixed[:, part] = scores / scores.sum(1, keepdims=True) @ v[:, part]
    x = x + mixed @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
    inner = (
        layer_norm(x, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"]) @ w[f"{name}.mlp.fc1.weight"].T
        + w[f"{name}.mlp.fc1.bias"]
    )
    inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    return x + inner @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]


def reference(w: dict, image: np.ndarray, visible: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (1 + V, W), pixels (3, S, S)) of one normalised image; w: tensors by their public names, float64."""
    tokens = [w["cls_token"][0, 0] + w["pos_embed"][0, 0]]
    for index in visible:
        y, x = index // GRID * PATCH, index % GRID * PATCH
        cut = image[:, y : y + PATCH, x : x + PATCH]
        projected = np.array([(kernel * cut).sum() for kernel in w["patch_embed.proj.weight"]])
        tokens.append(projected + w["patch_embed.proj.bias"] + w["pos_embed"][0, 1 + index])
    tokens = np.array(tokens)
    for i in range(TINY["depth"]):
        tokens = block(tokens, w, f"blocks.{i}", TINY["heads"])
    tokens = layer_norm(tokens, w["norm.weight"], w["norm.bias"])

    known = tokens @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
    whole = [known[0]] + [
        known[1 + visible.index(i)] if i in visible else w["mask_token"][0, 0] for i in range(GRID * GRID)
    ]
    whole = np.array(whole) + w["decoder_pos_embed"][0]
    for i in range(TINY["decoder_depth"]):
        whole = block(whole, w, f"decoder_blocks.{i}", TINY["decoder_heads"])
    whole = (
        layer_norm(whole, w["decoder_norm.weight"], w["decoder_norm.bias"]) @ w["decoder_pred.weight"].T
        + w["decoder_pred.bias"]
    )
    pixels = np.zeros((3, SIDE, SIDE))
    for index in range(GRID * GRID):
        top, left = index // GRID * PATCH, index % GRID * PATCH
        for n, value in enumerate(whole[1 + index]):  # (row, column, channel), the channel last
            row, column, channel = n // (3 * PATCH), n // 3 % PATCH, n % 3
            pixels[channel, top + row, left + column] = value
    return tokens, pixels


def public_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of facebookresearch/mae, for the TINY shape."""
    width, inner, pixels = TINY["width"], TINY["decoder_width"], 3 * PATCH * PATCH
    names = {
        "cls_token": (1, 1, width), "pos_embed": (1, 17, width), "mask_token": (1, 1, inner),
        "decoder_pos_embed": (1, 17, inner),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,), "decoder_norm.weight": (inner,), "decoder_norm.bias": (inner,),
        "decoder_embed.weight": (inner, width), "decoder_embed.bias": (inner,),
        "decoder_pred.weight": (pixels, inner), "decoder_pred.bias": (pixels,),
    }  # fmt: skip
    for prefix, w, depth in (("blocks", width, TINY["depth"]), ("decoder_blocks", inner, TINY["decoder_depth"])):
        for i in range(depth):
            names |= block_names(f"{prefix}.{i}", w)
    return names


@pytest.fixture(scope="module")
def public() -> dict[str, torch.Tensor]:
    """Random weights of a public checkpoint, its positions too, so that what is given is seen to be used."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in public_names().items()}


@pytest.fixture(scope="module")
def loaded(public, tmp_path_factory) -> MaskedAutoencoder:
    """The same weights in our model, by way of a file as the public ones are."""
    path = tmp_path_factory.mktemp("public") / "checkpoint.pth"
    torch.save({"model": public, "args": argparse.Namespace(model="mae_vit", lr=1e-3), "epoch": 799}, path)
    return weights.build(config.Model(weights=str(path), options=TINY))


@pytest.mark.parametrize("kind, size", [("random", 0.75), ("centre", 0.5), ("outpaint", 0.5), ("brush", 0.3)])
def test_tokens_and_pixels_of_a_public_checkpoint_are_those_of_the_reference(public, loaded, kind, size):
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    view = views.draw([config.ViewSpec(kind=kind, size=size)], GRID, 2, np.random.default_rng(0))
    w = {name: tensor.double().numpy() for name, tensor in public.items()}
    with torch.no_grad():
        for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            model, given = loaded.to(dtype), images.to(dtype)
            tokens, filled = model.encode(given, view), model.reconstruct(given, view)
            loss = model.training_loss(given, view)
            errors = []
            for row in range(2):
                expected, pixels = reference(w, images[row].numpy(), view.visible[row].tolist())
                hidden = view.pixel_mask(SIDE)[row, 0].numpy()
                np.testing.assert_allclose(tokens[row], expected, atol=close, rtol=close)
                np.testing.assert_allclose(filled[row].numpy()[:, hidden], pixels[:, hidden], atol=close, rtol=close)
                assert np.array_equal(filled[row].numpy()[:, ~hidden], given[row].numpy()[:, ~hidden])
                errors.append(((pixels - images[row].numpy()) ** 2)[:, hidden].mean())
            assert float(loss) == pytest.approx(np.mean(errors), rel=1e-5)
    loaded.float()


def test_a_fresh_model_has_the_fixed_positions():
    model = weights.build(config.Model(variant="vit_nano_patch4_32"))
    np.testing.assert_allclose(model.encoder.pos_embed[0], positions(128, 8), atol=1e-6)
    np.testing.assert_allclose(model.decoder.pos_embed[0], positions(96, 8), atol=1e-6)
    assert "encoder.pos_embed" in model.state_dict() and "encoder.pos_embed" not in dict(model.named_parameters())


def test_the_encoder_of_a_public_fine_tuning_checkpoint_alone_is_told(public, tmp_path):
    encoder = {n: t for n, t in public.items() if not n.startswith("decoder") and n != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    with pytest.raises(WeightsError, match="holds an encoder alone, and the decoder is needed too.*mae_visualize"):
        weights.build(config.Model(weights=str(tmp_path / "encoder.pth"), options=TINY))


@pytest.mark.parametrize(
    "variant, encoder, whole",
    [("vit_base_patch16", 85_798_656, 111_907_840), ("vit_large_patch16", 303_301_632, 329_541_888),
     ("vit_huge_patch14", 630_764_800, 657_074_508)],
)  # fmt: skip
def test_the_named_sizes_have_the_published_numbers_of_parameters(variant, encoder, whole):
    """Positions included, as the public models count them."""
    with torch.device("meta"):
        model = MaskedAutoencoder(base.options(config.Model(variant=variant)))
    assert sum(t.numel() for t in model.encoder.state_dict().values()) == encoder
    assert sum(t.numel() for t in model.state_dict().values()) == whole


@pytest.mark.parametrize(
    "options, message",
    [({"image_size": 30}, "model.options.*30 is not a multiple of patch_size 8"),
        ({"heads": 3}, "width 16 must be a multiple"),
     ({"widht": 8}, "model.options.widht"),
     ({"decoder_width": 6, "decoder_heads": 2}, "width 6 must be a multiple of 4")],
)  # fmt: skip
def test_a_shape_that_cannot_be_is_told(options, message):
    with pytest.raises(ConfigError, match=message):
        weights.build(config.Model(options=TINY | options))


def test_activation_checkpointing_changes_no_gradient(loaded):
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    view = views.draw([config.ViewSpec()], GRID, 2, np.random.default_rng(0))
    gradients = []
    for active in (False, True):
        loaded.encoder.activation_checkpointing = active
        loaded.zero_grad()
        loaded.encode(images, view).square().mean().backward()
        gradients.append([p.grad.clone() for p in loaded.encoder.parameters()])
    loaded.encoder.activation_checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_initialisation_is_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (weights.build(config.Model(options=TINY), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["encoder.cls_token"], c["encoder.cls_token"])


def test_the_initial_weights_of_a_seed_never_change():
    """The values themselves: a run without weights starts alike with a later version."""
    model = weights.build(config.Model(options=TINY), 7)
    found = [*model.encoder.cls_token.flatten()[:3].tolist(), *model.decoder.pred.weight.flatten()[:3].tolist()]
    assert found == pytest.approx([0.0042, 0.0437, 0.0198, -0.1428, 0.0439, -0.0597], abs=6e-5)
    assert sum(float(p.detach().double().abs().sum()) for p in model.parameters()) == pytest.approx(
        1598.43989, rel=1e-6
    )
