"""Folders of transformers' ViTMAEForPreTraining: read, computed alike, written back."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import TINY

import unlearn.torchvision_cpu  # noqa: F401  transformers imports torchvision
from unlearn import config, views
from unlearn.errors import WeightsError
from unlearn.models import weights
from unlearn.planning.shape import model_options

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs():
    settings = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(settings).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def build(folder):
    model = config.Model(weights=str(folder))
    built = weights.build(model)
    assert model_options(model)[0] == built.options
    return built


def inputs():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return images, views.draw([config.ViewSpec(kind="random", size=0.5)], 4, 2, np.random.default_rng(0))


def noise_for(view):
    """Both see the same patches: theirs shuffle by noise, so the noise puts the visible ones first, in order."""
    return torch.zeros(2, 16).scatter(
        1, torch.cat([view.visible, view.hidden], 1), torch.arange(16.0).expand(2, 16).contiguous()
    )


def compare(theirs, ours):
    images, view = inputs()
    theirs.config.mask_ratio, noise = 0.5, noise_for(view)
    with torch.no_grad():
        out = theirs(images, noise=noise, output_hidden_states=True)
        hidden = theirs.vit(images, noise=noise).last_hidden_state
        tokens = ours.encode(images, view)
        filled = ours.decoder(tokens, view)
    torch.testing.assert_close(tokens, hidden, atol=1e-5, rtol=1e-5)
    # (B, L, 3, P, P) to their order: row, column, channel
    torch.testing.assert_close(filled.permute(0, 1, 3, 4, 2).flatten(2), out.logits, atol=1e-5, rtol=1e-5)


def test_a_folder_of_transformers_computes_what_transformers_compute(theirs, folder):
    ours = build(folder)
    assert ours.options.norm_eps == theirs.config.layer_norm_eps and ours.options.width == 16
    compare(theirs, ours)


def test_names_of_released_files_are_read_too(theirs, folder):
    held = load_file(folder / "model.safetensors")
    released = {n.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): t for n, t in held.items()}
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in released
    save_file(released, folder / "model.safetensors")
    compare(theirs, build(folder))


def test_written_back_it_is_the_same_model_for_transformers(folder, tmp_path):
    ours = build(folder)
    ours.to_folder(tmp_path / "back")
    compare(transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "back").eval(), ours)
    again = build(tmp_path / "back")
    assert again.options == ours.options
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in ours.state_dict().items())


def test_pixels_normalised_by_patch_are_learnt_as_transformers_learn_them(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(theirs.config, "norm_pix_loss", True)
    monkeypatch.setattr(theirs.config, "mask_ratio", 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build(tmp_path / "theirs")
    assert ours.options.norm_pix_loss
    images, view = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours.training_loss(images, view), theirs(images, noise=noise_for(view)).loss)
    ours.to_folder(tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["norm_pix_loss"] is True


def test_the_image_processors_statistics_are_taken(folder):
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    assert build(folder).options.mean == (0.1, 0.2, 0.3) and build(folder).options.std == (0.4, 0.5, 0.6)
    # (pixel / 127.5 - 1) / 1, as some processors write it
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": [1.0, 1.0, 1.0]})
    )
    assert build(folder).options.mean == build(folder).options.std == (0.5, 0.5, 0.5)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}))
    assert build(folder).options.mean == (0, 0, 0) and build(folder).options.std == (1, 1, 1)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "vit"}, "config.json is of a 'vit', not of a ViTMAE"),
    ({"qkv_bias": False}, "without qkv_bias"),
    ({"decoder_intermediate_size": 64}, "different MLP ratios"),
    ({"image_size": None}, "model.options.image_size"),
    (None, "config.json is missing or damaged"),
    ("lost", "lacks model.safetensors"),
])  # fmt: skip
def test_other_folders_are_refused_in_words(folder, change, message):
    path = folder / "config.json"
    if change is None:
        path.write_text("{")
    elif change == "lost":
        (folder / "model.safetensors").unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Exception, match=message) as error:
        build(folder)
    assert type(error.value).__name__ in ("WeightsError", "ConfigError")


def test_folders_in_parts_of_half_precision_and_of_old_versions(theirs, folder, tmp_path):
    half = {n: t.half() for n, t in build(folder).state_dict().items()}
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    theirs.save_pretrained(tmp_path / "variant", variant="fp16")
    theirs.save_pretrained(tmp_path / "variant-parts", variant="fp16", max_shard_size="10KB")
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    for name in ("parts", "variant", "variant-parts", "old"):
        assert len(list((tmp_path / name).glob("*model*-of-*"))) == (
            0 if "parts" not in name else pytest.approx(10, abs=9)
        )
        found = build(tmp_path / name).state_dict()
        assert all(torch.equal(t.half(), half[n]) for n, t in found.items())
    next((tmp_path / "parts").glob("model-00002-of-*")).unlink()
    with pytest.raises(WeightsError, match="lacks model-00002-of-.*give a whole folder"):
        build(tmp_path / "parts")


def test_of_parts_the_index_says_which_holds_what(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="10KB", variant="bf16")
    index = next(tmp_path.glob("*index*"))
    kept = json.loads(index.read_text())
    first, second = (tmp_path / name for name in sorted(set(kept["weight_map"].values()))[:2])
    name = next(n for n, part in kept["weight_map"].items() if part == first.name)
    stale = torch.zeros_like(load_file(first)[name])
    save_file(load_file(second) | {name: stale}, second)  # left behind in another part
    compare(theirs, build(tmp_path))
    for change, message in (
        ({"extra": first.name}, f"its index says that {first.name} holds extra, which is not there"),
        ({"extra": "../../elsewhere.safetensors"}, "its weight_map names no files of its folder"),
    ):
        index.write_text(json.dumps(kept | {"weight_map": kept["weight_map"] | change}))
        with pytest.raises(WeightsError, match=message):
            build(tmp_path)


def test_an_encoder_alone_is_told(theirs, tmp_path):
    theirs.vit.save_pretrained(tmp_path / "encoder")
    with pytest.raises(
        WeightsError, match=r"holds the encoder alone \(a ViTMAEModel\): save the whole ViTMAEForPreTraining"
    ):
        weights.build(config.Model(weights=str(tmp_path / "encoder")))


def test_its_file_without_the_folder_is_told(folder):
    with pytest.raises(WeightsError, match="names of transformers' ViTMAE: give their folder, with its config.json"):
        weights.build(config.Model(weights=str(folder / "model.safetensors"), options=TINY))


def test_a_tensor_that_is_missing_is_named(folder):
    held = load_file(folder / "model.safetensors")
    held.pop(next(n for n in held if "layer.1" in n and "query.weight" in n))
    save_file(held, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="missing encoder.blocks.1.attn.qkv.weight"):
        build(folder)


def test_tiny_stays_tiny():
    assert weights.build(config.Model(options=TINY)).options.norm_eps == 1e-6
