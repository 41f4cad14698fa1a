"""MAGE and its tokenizer against implementations of their own, written plainly from the papers and the public layouts."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from support import runs

from unlearn import config, views
from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, mage, tokenizer, weights
from unlearn.models.mage import MaskedGenerativeEncoder

SIDE, GRID, CODES, WIDTH, INNER, LATENT = 16, 4, 12, 16, 24, 6
VOCABULARY, CLASS = CODES + 9, CODES + 3
CHANNELS, LAYERS, GROUPS = (4, 4, 8), 2, 2
MEAN, STD = np.array([0.5, 0.375, 0.25]).reshape(3, 1, 1), np.array([0.1875, 0.3125, 0.25]).reshape(3, 1, 1)
SMALL = {
    "image_size": SIDE, "width": WIDTH, "depth": 2, "heads": 2, "decoder_width": INNER, "decoder_depth": 1, "decoder_heads": 2,
    "codes": CODES, "code_width": LATENT, "vocabulary": VOCABULARY, "class_token": CLASS, "channels": CHANNELS, "layers": LAYERS,
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


# --- the reference: numpy, float64, one image, tensors by their public names


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
        "encoder.conv_in.weight": (CHANNELS[0], 3, 3, 3), "encoder.conv_out.weight": (LATENT, CHANNELS[-1], 1, 1), "encoder.conv_out.bias": (LATENT,),
        "decoder.conv_in.weight": (CHANNELS[-1], LATENT, 3, 3), "decoder.conv_in.bias": (CHANNELS[-1],),
        "decoder.conv_out.weight": (3, CHANNELS[0], 3, 3), "decoder.conv_out.bias": (3,), "quantize.embedding.weight": (CODES, LATENT),
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
        "token_emb.word_embeddings.weight": (VOCABULARY, WIDTH), "token_emb.position_embeddings.weight": (tokens, WIDTH),
        "token_emb.LayerNorm.weight": (WIDTH,), "token_emb.LayerNorm.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
        "decoder_embed.weight": (INNER, WIDTH), "decoder_embed.bias": (INNER,), "decoder_pos_embed_learned": (1, tokens, INNER),
        "decoder_norm.weight": (INNER,), "decoder_norm.bias": (INNER,), "mlm_layer.fc.weight": (WIDTH, INNER), "mlm_layer.fc.bias": (WIDTH,),
        "mlm_layer.ln.weight": (WIDTH,), "mlm_layer.ln.bias": (WIDTH,), "mlm_layer.bias": (1, 1, VOCABULARY),
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, tokens, WIDTH), "mask_token": (1, 1, INNER), "decoder_pos_embed": (1, tokens, INNER),
        "patch_embed.proj.weight": (WIDTH, 3, 4, 4), "patch_embed.proj.bias": (WIDTH,), "decoder_pred.weight": (48, INNER), "decoder_pred.bias": (48,),
    }  # fmt: skip
    for prefix, w, depth in (("blocks", WIDTH, SMALL["depth"]), ("decoder_blocks", INNER, SMALL["decoder_depth"])):
        for i in range(depth):
            shapes = {
                "norm1": (w,),
                "attn.qkv": (3 * w, w),
                "attn.proj": (w, w),
                "norm2": (w,),
                "mlp.fc1": (4 * w, w),
                "mlp.fc2": (w, 4 * w),
            }
            for name, shape in shapes.items():
                names |= {f"{prefix}.{i}.{name}.weight": shape, f"{prefix}.{i}.{name}.bias": shape[:1]}
    return names


def randoms(names: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in names.items()}


@pytest.fixture(scope="module")
def public() -> dict[str, torch.Tensor]:
    return randoms(mage_names(), 0) | {"token_emb.position_ids": torch.arange(1 + GRID * GRID)[None]}


@pytest.fixture(scope="module")
def coder() -> dict[str, torch.Tensor]:
    """Codes that lie among the latents, so that an image has many of them."""
    tensors = randoms(tokenizer_names(), 1)
    latents = latents_of(double(tensors), pictures(1, seed=9)[0].numpy() * STD + MEAN)
    return tensors | {"quantize.embedding.weight": torch.from_numpy(latents[:CODES]).float()}


@pytest.fixture(scope="module")
def loaded(public, coder, tmp_path_factory) -> MaskedGenerativeEncoder:
    """The same weights in our model, by way of one file as the public ones are, the tokenizer under `vqgan.`."""
    path = tmp_path_factory.mktemp("public") / "mage.pth"
    whole = public | {f"vqgan.{name}": tensor for name, tensor in coder.items()}
    torch.save({"model": whole, "args": argparse.Namespace(model="mage_vit", lr=1e-3), "epoch": 1599}, path)
    return build(weights=str(path))


def double(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind, size", [("random", 0.75), ("centre", 0.5), ("outpaint", 0.5)])
def test_embedding_and_logits_of_a_public_checkpoint_are_those_of_the_reference(public, loaded, kind, size):
    view, w = draw(kind, size), double(public)
    tokens = torch.randint(CODES, (2, 2, GRID * GRID), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for dtype, close in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
            model = loaded.to(dtype)
            found = model.encode(tokens, view)
            guessed, loss = model.decoder(found, view.visible), float(model.training_loss(tokens, view))
            errors = []
            for row in range(2):
                visible, hidden = view.visible[row].tolist(), view.hidden[row].tolist()
                embedding = encoded(w, tokens[row, 0].numpy(), visible)
                expected = logits(w, embedding, visible)
                np.testing.assert_allclose(found[row], embedding, atol=close, rtol=close)
                np.testing.assert_allclose(guessed[row], expected, atol=close, rtol=close)
                for place in hidden:  # the label gets 0.9, and 0.1 is spread over the whole vocabulary
                    chance = expected[place] - np.log(np.exp(expected[place]).sum())
                    errors.append(-0.9 * chance[tokens[row, 1, place]] - 0.1 * chance.mean())
            assert loss == pytest.approx(np.mean(errors), rel=1e-5)
    loaded.float()


def test_tokens_and_pixels_of_the_public_tokenizer_are_those_of_the_reference(coder, loaded):
    images, view, w = pictures(), draw("centre"), double(coder)
    model = loaded.double()
    with torch.no_grad():
        tokens = model.first_stage(images, view)
        codes = model.decoder.codebook(tokens[:, 1]).transpose(1, 2).unflatten(2, (GRID, GRID))
        found = model.decoder.paint(codes).numpy() * STD + MEAN
    loaded.float()
    assert tokens.shape == (2, 2, GRID * GRID) and tokens.dtype == torch.int64 and len(tokens.unique()) > 4
    for row in range(2):
        pixels, mask = images[row].numpy() * STD + MEAN, view.pixel_mask(SIDE)[row].numpy()
        for which, given in enumerate(
            (np.where(mask, MEAN, pixels), pixels)
        ):  # the hole is filled with the mean colour
            expected, clear = tokens_of(w, given)
            sure = clear > 1e-6
            assert sure.sum() > 12 and np.array_equal(tokens[row, which].numpy()[sure], expected[sure])
        np.testing.assert_allclose(found[row], painted(w, tokens[row, 1].numpy()), atol=1e-9, rtol=1e-9)


def test_the_tokenizer_may_lie_in_a_file_of_its_own(public, coder, loaded, tmp_path):
    torch.save({"model": public}, tmp_path / "mage.pth")
    torch.save({"state_dict": coder | {"loss.discriminator.weight": torch.ones(2)}}, tmp_path / "tokenizer.ckpt")
    whole = build(weights=str(tmp_path / "mage.pth"), first_stage=str(tmp_path / "tokenizer.ckpt"))
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in whole.state_dict().items())
    alone = build(first_stage=str(tmp_path / "tokenizer.ckpt")).state_dict()
    assert torch.equal(alone["first_stage.codebook.weight"], coder["quantize.embedding.weight"])
    assert torch.equal(alone["decoder.pixels.conv_out.weight"], coder["decoder.conv_out.weight"])
    with pytest.raises(WeightsError, match="name its weights in model.first_stage"):
        build(weights=str(tmp_path / "mage.pth"))
    torch.save({n: t for n, t in coder.items() if "mid" not in n}, tmp_path / "less.ckpt")
    with pytest.raises(WeightsError, match="missing first_stage.encoder.mid.block_1"):
        build(first_stage=str(tmp_path / "less.ckpt"))


def test_the_first_stage_of_a_folder_of_ours_serves_another_model(loaded, tmp_path):
    weights.write(loaded, str(tmp_path / "ours"), {})
    other = build(SMALL | {"depth": 1}, first_stage=str(tmp_path / "ours"))
    for name, tensor in other.state_dict().items():
        if name.startswith(tokenizer.TOKENIZER_TENSORS):
            assert torch.equal(tensor, loaded.state_dict()[name])
    assert {n.split(".")[1] for n in loaded.state_dict() if n.startswith(tokenizer.TOKENIZER_TENSORS)} == {
        "encoder",
        "codebook",
        "pixels",
    }


def test_a_diffusers_folder_gives_the_codes_and_images_of_diffusers(tmp_path):
    from diffusers import VQModel

    torch.manual_seed(0)
    theirs = VQModel(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=CHANNELS,
        layers_per_block=LAYERS, latent_channels=5, num_vq_embeddings=CODES, vq_embed_dim=LATENT, norm_num_groups=GROUPS,
    ).eval()  # fmt: skip
    images = pictures(seed=3).float()
    signed = (images * torch.from_numpy(STD) + torch.from_numpy(MEAN)).float() * 2 - 1
    with torch.no_grad():
        theirs.quantize.embedding.weight.copy_(theirs.encode(signed).latents[0].flatten(1).T[:CODES] + 0.01)
    theirs.save_pretrained(tmp_path / "vq")
    model = build(DIFFUSERS, first_stage=str(tmp_path / "vq"))
    with torch.no_grad():
        latents = theirs.encode(signed).latents
        _, _, (_, _, expected) = theirs.quantize(latents)
        tokens = model.first_stage.tokens(images)
        assert torch.equal(tokens.flatten(), expected) and len(tokens.unique()) > 4
        codes = model.decoder.codebook(tokens).transpose(1, 2).unflatten(2, (GRID, GRID))
        pixels = (theirs.decode(latents).sample + 1) / 2
        torch.testing.assert_close(
            model.decoder.paint(codes) * torch.from_numpy(STD).float() + torch.from_numpy(MEAN).float(), pixels
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="no weights at .*empty"):
        build(DIFFUSERS, first_stage=str(tmp_path / "empty"))


def test_hidden_pixels_reach_the_first_tokens_never_and_the_others_always(loaded):
    images, view = pictures().float(), draw("centre")
    changed = torch.where(view.pixel_mask(SIDE), -images, images)
    with torch.no_grad():
        a, b = loaded.first_stage(images, view), loaded.first_stage(changed, view)
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.equal(a[:, 1], b[:, 1])


@pytest.mark.parametrize("steps, temperature", [(1, 0.0), (5, 0.0), (5, 1.0), (1000, 0.5)])
def test_decoding_keeps_what_is_seen_and_repeats_in_any_batch(public, coder, loaded, steps, temperature):
    model = build(SMALL | {"decoding_steps": steps, "temperature": temperature})
    model.load_state_dict(loaded.state_dict())
    tokens = torch.randint(CODES, (3, GRID * GRID), generator=torch.Generator().manual_seed(2))
    view, rounds, inner = draw(rows=3), [], model.encoder.forward
    model.encoder.forward = lambda tokens, known: (rounds.append(known), inner(tokens, known))[1]
    with torch.no_grad():
        full, again = model.complete(tokens, view), model.complete(tokens, view)
        assert torch.equal(full, again) and torch.equal(full[1:2], model.complete(tokens[1:2], view.rows(1, 2)))
    rounds = rounds[: len(rounds) // 3]
    assert torch.equal(full.gather(1, view.visible), tokens.gather(1, view.visible)) and int(full.max()) < CODES
    counts = [known.shape[1] for known in rounds]
    assert (
        len(counts) == min(steps, view.hidden.shape[1])
        and counts == sorted(set(counts))
        and counts[0] == view.visible.shape[1]
    )
    for earlier, later in zip(rounds, rounds[1:], strict=False):  # what is known stays known
        assert all(set(a) <= set(b) for a, b in zip(earlier.tolist(), later.tolist(), strict=True))


def test_one_round_takes_the_likeliest_code_of_each_hidden_place(loaded):
    model = build(SMALL | {"decoding_steps": 1})
    model.load_state_dict(loaded.state_dict())
    tokens, view = torch.randint(CODES, (2, GRID * GRID), generator=torch.Generator().manual_seed(2)), draw()
    with torch.no_grad():
        guessed = model.decoder(model.encoder(tokens, view.visible), view.visible)[..., :CODES].argmax(2)
        assert torch.equal(model.complete(tokens, view).gather(1, view.hidden), guessed.gather(1, view.hidden))


def test_a_temperature_draws_tokens_from_their_distribution_and_is_of_the_confidence_alone(loaded, monkeypatch):
    """Of MAGE's two random choices the first, the token, does not know the temperature."""
    tokens, view, drawn = torch.zeros(1, GRID * GRID, dtype=torch.int64), draw(rows=1), {}
    for temperature in (0.5, 4.5):
        model = build(SMALL | {"decoding_steps": 1, "temperature": temperature})
        model.load_state_dict(loaded.state_dict())
        with torch.no_grad():
            drawn[temperature] = model.complete(tokens, view)
    assert torch.equal(drawn[0.5], drawn[4.5])
    shares = torch.tensor([0.6, 0.3, 0.1]).log()
    given = torch.cat([shares, torch.full((VOCABULARY - 3,), -100.0)]).expand(1, GRID * GRID, -1)
    monkeypatch.setattr(model.decoder, "forward", lambda embedding, known: given)
    counts, drawing, gumbel = torch.zeros(CODES), torch.Generator().manual_seed(0), mage._gumbel
    # `complete` starts its own generator from the same seed every time.
    monkeypatch.setattr(mage, "_gumbel", lambda shape, generator: gumbel(shape, drawing))
    for _ in range(100):
        with torch.no_grad():
            counts += torch.bincount(model.complete(tokens, view)[0, view.hidden[0]], minlength=CODES)
    torch.testing.assert_close(counts[:3] / counts.sum(), shares.exp(), atol=0.06, rtol=0)


def test_it_is_written_back_for_the_code_of_mage(public, coder, loaded, tmp_path):
    line = weights.convert(
        config.Model(family="mage", weights=_ours(loaded, tmp_path / "ours")), str(tmp_path / "theirs")
    )
    assert line == f"model.load_state_dict(torch.load('{tmp_path / 'theirs'}/mage.pth')['model'])"
    back = torch.load(tmp_path / "theirs" / "mage.pth", weights_only=True)["model"]
    whole = public | {f"vqgan.{name}": tensor for name, tensor in coder.items()}
    unused = mage.UNUSED_NAMES[:-1]
    assert back.keys() == whole.keys() | set(back) and {n: back[n].shape for n in whole} == {
        n: t.shape for n, t in whole.items()
    }
    assert {n for n in back if n not in whole} <= {n for n in back if n.startswith(unused)}
    assert all(torch.equal(back[n], t) for n, t in whole.items() if not n.startswith(unused) or "learned" in n)
    trained = build(weights=str(tmp_path / "ours"))
    with torch.no_grad():
        trained.encoder.word_embeddings.weight.add_(1)
    with pytest.raises(WeightsError, match="in MAGE both are one tensor.*train_words false"):
        weights.convert(config.Model(family="mage", weights=_ours(trained, tmp_path / "trained")), str(tmp_path / "no"))
    kept = [p.shape for p in runs.method().trainable(build(SMALL | {"train_words": False}))]
    assert len(kept) == len(list(loaded.encoder.parameters())) - 1


def _ours(model, folder) -> str:
    weights.write(model.float(), str(folder), {})
    return str(folder)


def test_noise_comes_from_a_stock_of_tokens_of_noise(loaded):
    inputs = torch.zeros(50, 2, GRID * GRID, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="stock"):
        build().noise_like(inputs, torch.Generator())
    loaded.stock_noise(loaded.first_stage, 4)
    drawn = [loaded.noise_like(inputs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert drawn[0].shape == inputs.shape and drawn[0].dtype == torch.int64
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and len(drawn[0].unique(dim=0)) > 30
    with torch.no_grad():
        first = loaded.first_stage.tokens(torch.randn(16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(loaded._noise_tokens[:16, 0], first) and "_noise_tokens" not in loaded.state_dict()
    loaded._noise_tokens = None


@pytest.mark.parametrize("options", [SMALL, DIFFUSERS], ids=["mage", "diffusers"])
def test_training_the_first_stage_uses_its_codes_and_keeps_both_codebooks_equal(options):
    model = build(options)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, GRID, GRID, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    parameters, before = model.first_stage_parameters(), {n: t.clone() for n, t in model.state_dict().items()}
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(60):
        losses.append(model.first_stage_loss(images[torch.randint(8, (4,), generator=generator)]))
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert float(losses[-1]) < 0.6 * float(losses[0])
    assert torch.equal(after["first_stage.codebook.weight"], after["decoder.codebook.weight"])
    moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert moved == {n for n in after if n.startswith(tokenizer.TOKENIZER_TENSORS)}
    assert len(model.first_stage.tokens(images).unique()) > 2 * CODES // 3


def test_the_tokenizer_is_never_trained_with_the_rest():
    model = build()
    trained = {id(p) for p in runs.method("pretrain").trainable(model)}
    names = {n for n, p in model.named_parameters() if id(p) in trained}
    assert (
        names == {n for n in model.state_dict() if not n.startswith(tokenizer.TOKENIZER_TENSORS)}
        and "decoder.head.weight" in names
    )


def test_moving_the_encoders_words_leaves_the_logits_words_alone(loaded):
    assert torch.equal(loaded.encoder.word_embeddings.weight, loaded.decoder.head.weight)
    assert loaded.encoder.word_embeddings.weight.data_ptr() != loaded.decoder.head.weight.data_ptr()


@pytest.mark.parametrize("variant, encoder", [("mage_vit_base", 86_810_112), ("mage_vit_large", 304_650_240)])
def test_the_named_sizes_are_those_of_the_paper(variant, encoder):
    """Encoder: 12 or 24 blocks, norm, and the embedding of 2025 words and 257 places with its norm; 54.5 M tokenizer."""
    with torch.device("meta"):
        model = MaskedGenerativeEncoder(base.options(config.Model(family="mage", variant=variant)))
    assert sum(t.numel() for t in model.encoder.state_dict().values()) == encoder
    assert model.grid == 16 and model.decoder.head.weight.shape == (2025, model.options.width)


@pytest.mark.parametrize("variant", ["mage_nano_32", "mage_micro_64"])
def test_the_tiny_shapes_can_be_built(variant):
    model = weights.build(config.Model(family="mage", variant=variant))
    assert model.grid == 8 and json.dumps(model.options.model_dump(mode="json"))


@pytest.mark.parametrize(
    "options, message",
    [({"image_size": 18}, "18 is not a multiple of 4"), ({"heads": 3}, "width 16 must be a multiple"),
     ({"norm_groups": 3}, "multiples of norm_groups 3"), ({"class_token": 2}, "class_token 2 must lie after the 12 codes"),
     ({"decoding_steps": 0}, "decoding_steps must be 1 or more"), ({"channels": ()}, "multiples of norm_groups 2"), ({"tokeniser": "mage"}, "tokeniser")],
)  # fmt: skip
def test_a_shape_that_cannot_be_is_told(options, message):
    with pytest.raises(ConfigError, match=message):
        build(SMALL | options)


def test_activation_checkpointing_changes_no_gradient(loaded):
    tokens, view = torch.randint(CODES, (2, 2, GRID * GRID), generator=torch.Generator().manual_seed(2)), draw()
    gradients = []
    for active_ in (False, True):
        loaded.encoder.activation_checkpointing = active_
        loaded.zero_grad()
        loaded.encode(tokens, view).square().mean().backward()
        gradients.append([p.grad.clone() for p in loaded.encoder.parameters()])
    loaded.encoder.activation_checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
