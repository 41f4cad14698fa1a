"""Pipeline folders of diffusers, in and out."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import made

from unlearn import config, views
from unlearn.errors import MissingExtra, WeightsError
from unlearn.models import folders, weights
from unlearn.models.diffusion import autoencoder, networks, pipeline, prompts


def prompted(kind: str, whole, prompt: str) -> dict[str, torch.Tensor]:
    """What the pipeline's text encoders make of a prompt, by hand."""
    ids = torch.tensor([whole.tokenizer(prompt, padding="max_length", max_length=9, truncation=True).input_ids])
    with torch.no_grad():
        if kind == "sd":
            return {"shared.prompt": whole.text_encoder(ids).last_hidden_state}
        if kind == "flux":
            long = torch.tensor(
                [whole.tokenizer_2(prompt, padding="max_length", max_length=512, truncation=True).input_ids]
            )
            return {
                "shared.prompt": whole.text_encoder_2(long).last_hidden_state,
                "shared.pooled": whole.text_encoder(ids).pooler_output,
            }
        first, second = (
            encoder(ids, output_hidden_states=True) for encoder in (whole.text_encoder, whole.text_encoder_2)
        )
        both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=2)
        return {"shared.prompt": both, "shared.pooled": second.text_embeds}


@pytest.mark.parametrize("kind", ["sd", "xl", "flux"])
def test_a_pipeline_folder_goes_in_and_out(kind, tmp_path):
    whole = made(kind)
    whole.save_pretrained(tmp_path / "theirs")
    tensors, options = pipeline.read(tmp_path / "theirs", {"prompt": "a cat"})
    network = options["network"]["class"]
    home, file = networks.NETWORKS[network].folder, networks.module(network)
    expected = file.from_public(getattr(whole, home).state_dict()) | autoencoder.from_public(whole.vae.state_dict())
    text = prompted(kind, whole, "a cat")
    assert tensors.keys() == expected.keys() | text.keys()
    assert all(torch.equal(tensors[n], t) for n, t in expected.items())
    for name, tensor in text.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-6, rtol=1e-6)
    assert options["tokens"] == text["shared.prompt"].shape[1] and options["image_size"] == (
        256 if kind == "flux" else 32
    )
    met = prompts._encoded.cache_info()
    other = pipeline.read(tmp_path / "theirs", {"prompt": "a cat"})[0]  # as the teacher does
    assert prompts._encoded.cache_info().misses == met.misses
    assert all(tensors[n].data_ptr() != other[n].data_ptr() for n in text)
    shutil.copytree(tmp_path / "theirs", tmp_path / "shape", ignore=shutil.ignore_patterns("*.safetensors"))
    assert pipeline.options(tmp_path / "shape", {}) == options
    empty = pipeline.read(tmp_path / "theirs", {})[0]
    # without a prompt SDXL is given zeros
    assert not torch.equal(empty["shared.prompt"], tensors["shared.prompt"]) and (kind == "xl") == (
        not empty["shared.prompt"].any()
    )

    pipeline.write(tensors, SimpleNamespace(**options), tmp_path / "ours")
    assert not list((tmp_path / "ours").rglob("*.bin"))
    absent = {n: None for n in prompts.TEXT if hasattr(whole, n)}
    back = type(whole).from_pretrained(tmp_path / "ours", local_files_only=True, **absent)
    for part in (home, "vae"):
        theirs = getattr(whole, part).state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in getattr(back, part).state_dict().items()) and theirs
    assert dict(back.scheduler.config).items() >= folders.public(options["scheduler"]).items()
    again, same = pipeline.read(tmp_path / "ours", {})
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())
    assert same["network"] == options["network"] | {"dropout": 0.0} or same["network"] == options["network"]
    assert pipeline.options(tmp_path / "ours", {}) == same
    with pytest.raises(WeightsError, match="has no text_encoder, which model.options.prompt needs"):
        pipeline.read(tmp_path / "ours", {"prompt": "a cat"})
    (tmp_path / "ours" / prompts.FILE).unlink()
    with pytest.raises(WeightsError, match="has no text_encoder to embed a prompt with.*model.options.prompt to null"):
        pipeline.read(tmp_path / "ours", {})
    zeros = pipeline.read(tmp_path / "ours", {"prompt": None})[0]
    assert all(not zeros[n].any() for n in text)

    # with the text encoders given it fills in holes, as the original does
    images = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    hole = Image.fromarray(np.kron([[0, 1], [0, 0]], np.full((16, 16), 255)).astype(np.uint8))
    parts = {n: getattr(whole, n) for n in absent}
    back = type(whole).from_pretrained(tmp_path / "ours", local_files_only=True, **parts)
    filled = []
    for each in (whole, back):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 2, "height": 32, "width": 32, "generator": generator, "output_type": "np"}
        filled.append(
            each(
                "a cat", image=images, mask_image=hole, **arguments, **({} if kind == "flux" else {"strength": 1.0})
            ).images
        )
    np.testing.assert_allclose(*filled, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "xl", "flux"])
@torch.no_grad()
def test_the_family_takes_such_a_folder_with_options_of_the_config(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "theirs")
    images, view = (
        torch.rand(2, 3, 32, 32) * 2 - 1,
        views.draw([config.ViewSpec(kind="box", size=0.5)], 4, 2, np.random.default_rng(0)),
    )

    def build(folder: str, **options):
        options = {"grid": 4, "image_size": 32, "sampling_steps": 2, **options}
        return weights.build(config.Model(family="diffusion", weights=str(tmp_path / folder), options=options))

    model, silent = build("theirs", prompt="a cat"), build("theirs")
    expected = model.reconstruct(images, view)
    assert not torch.equal(silent.reconstruct(images, view), expected)
    model.to_folder(tmp_path / "ours")
    back = build("ours").state_dict()
    assert back.keys() == model.state_dict().keys() and all(
        torch.equal(back[n], t) for n, t in model.state_dict().items()
    )
    weights.write(model, str(tmp_path / "model"), {})
    assert torch.equal(
        weights.build(config.Model(family="diffusion", weights=str(tmp_path / "model"))).reconstruct(images, view),
        expected,
    )
    if kind == "flux":  # cut elsewhere it is the same model
        for folder in ("ours", "model"):
            cut = build(folder, encoder_blocks=2)
            assert len(cut.encoder.single_transformer_blocks) == 1 and not model.encoder.single_transformer_blocks
            torch.testing.assert_close(cut.reconstruct(images, view), expected, atol=1e-5, rtol=1e-5)


def test_text_encoders_in_half_precision_are_computed_in_single(tmp_path, capfd):
    whole = made("xl")
    expected = prompted("xl", whole, "a cat")
    for part in (whole.text_encoder, whole.text_encoder_2):
        part.half()
    whole.save_pretrained(tmp_path / "plain")
    whole.save_pretrained(tmp_path / "variant", variant="fp16")
    capfd.readouterr()
    for name in ("plain", "variant"):
        found = pipeline.read(tmp_path / name, {"prompt": "a cat"})[0]
        for key, tensor in expected.items():
            assert found[key].dtype == torch.float32
            torch.testing.assert_close(found[key], tensor, atol=2e-3, rtol=2e-3)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_latent_pipeline_is_told(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="has neither unet nor transformer"):
        pipeline.read(tmp_path, {})
    made("sd").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(described | {"_class_name": "UNet2DModel"}))
    with pytest.raises(
        WeightsError, match="unet holds a UNet2DModel; known in a latent pipeline: UNet2DConditionModel"
    ):
        pipeline.read(tmp_path, {})
    (tmp_path / "unet" / "config.json").write_text(json.dumps(described))
    find = prompts.importlib.util.find_spec
    monkeypatch.setattr(
        prompts.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(MissingExtra, match=r"a prompt's embedding needs transformers.*pip install 'unlearn\[text\]'"):
        pipeline.read(tmp_path, {})
    monkeypatch.undo()
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="its text encoders cannot be used"):
        pipeline.read(tmp_path, {})
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(WeightsError, match="config.json is missing"):
        pipeline.read(tmp_path, {})


def test_an_autoencoder_that_diffusers_does_not_know_cannot_be_written(tmp_path):
    with pytest.raises(WeightsError, match="diffusers has no class for the autoencoder TAEF2"):
        pipeline.write({}, SimpleNamespace(network={"class": "UNet2DConditionModel"}, vae={"class": "TAEF2"}), tmp_path)
