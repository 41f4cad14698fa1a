"""MAGE's tokenizer against an implementation of its own, and against that of diffusers."""

import numpy as np
import pytest
import torch
from support import runs
from support.mage import (
    CHANNELS,
    CODES,
    DIFFUSERS,
    GRID,
    GROUPS,
    LATENT,
    LAYERS,
    MEAN,
    SIDE,
    SMALL,
    STD,
    build,
    double,
    draw,
    painted,
    pictures,
    tokens_of,
)

from unlearn.errors import WeightsError
from unlearn.models import tokenizer, weights


def test_tokens_and_pixels_of_the_public_tokenizer_are_those_of_the_reference(public_tokenizer, loaded_mage):
    images, view, w = pictures(), draw("centre"), double(public_tokenizer)
    model = loaded_mage.double()
    with torch.no_grad():
        tokens = model.first_stage(images, view)
        codes = model.decoder.codebook(tokens[:, 1]).transpose(1, 2).unflatten(2, (GRID, GRID))
        found = model.decoder.paint(codes).numpy() * STD + MEAN
    loaded_mage.float()
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


def test_the_tokenizer_may_lie_in_a_file_of_its_own(public_mage, public_tokenizer, loaded_mage, tmp_path):
    torch.save({"model": public_mage}, tmp_path / "mage.pth")
    torch.save(
        {"state_dict": public_tokenizer | {"loss.discriminator.weight": torch.ones(2)}}, tmp_path / "tokenizer.ckpt"
    )
    whole = build(weights=str(tmp_path / "mage.pth"), first_stage=str(tmp_path / "tokenizer.ckpt"))
    assert all(torch.equal(t, loaded_mage.state_dict()[n]) for n, t in whole.state_dict().items())
    alone = build(first_stage=str(tmp_path / "tokenizer.ckpt")).state_dict()
    assert torch.equal(alone["first_stage.codebook.weight"], public_tokenizer["quantize.embedding.weight"])
    assert torch.equal(alone["decoder.pixels.conv_out.weight"], public_tokenizer["decoder.conv_out.weight"])
    with pytest.raises(WeightsError, match="name its weights in model.first_stage"):
        build(weights=str(tmp_path / "mage.pth"))
    torch.save({n: t for n, t in public_tokenizer.items() if "mid" not in n}, tmp_path / "less.ckpt")
    with pytest.raises(WeightsError, match="missing first_stage.encoder.mid.block_1"):
        build(first_stage=str(tmp_path / "less.ckpt"))


def test_the_first_stage_of_a_folder_of_ours_serves_another_model(loaded_mage, tmp_path):
    weights.write(loaded_mage, str(tmp_path / "ours"), {})
    other = build(SMALL | {"depth": 1}, first_stage=str(tmp_path / "ours"))
    for name, tensor in other.state_dict().items():
        if name.startswith(tokenizer.TOKENIZER_TENSORS):
            assert torch.equal(tensor, loaded_mage.state_dict()[name])
    assert {n.split(".")[1] for n in loaded_mage.state_dict() if n.startswith(tokenizer.TOKENIZER_TENSORS)} == {
        "encoder",
        "codebook",
        "pixels",
    }


def test_a_diffusers_folder_gives_the_codes_and_images_of_diffusers(tmp_path):
    from diffusers import VQModel

    torch.manual_seed(0)
    theirs = VQModel(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=CHANNELS,
        layers_per_block=LAYERS, latent_channels=5, num_vq_embeddings=CODES, vq_embed_dim=LATENT,
        norm_num_groups=GROUPS,
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


def test_hidden_pixels_reach_the_first_tokens_never_and_the_others_always(loaded_mage):
    images, view = pictures().float(), draw("centre")
    changed = torch.where(view.pixel_mask(SIDE), -images, images)
    with torch.no_grad():
        a, b = loaded_mage.first_stage(images, view), loaded_mage.first_stage(changed, view)
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.equal(a[:, 1], b[:, 1])


def test_noise_comes_from_a_stock_of_tokens_of_noise(loaded_mage):
    inputs = torch.zeros(50, 2, GRID * GRID, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="stock"):
        build().noise_like(inputs, torch.Generator())
    loaded_mage.stock_noise(loaded_mage.first_stage, 4)
    drawn = [loaded_mage.noise_like(inputs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert drawn[0].shape == inputs.shape and drawn[0].dtype == torch.int64
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and len(drawn[0].unique(dim=0)) > 30
    with torch.no_grad():
        first = loaded_mage.first_stage.tokens(
            torch.randn(16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
        )
    assert torch.equal(loaded_mage._noise_tokens[:16, 0], first) and "_noise_tokens" not in loaded_mage.state_dict()
    loaded_mage._noise_tokens = None


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
