"""Autoencoders before it of latent diffusion, and the pipeline folders they come in."""

import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.pipelines import FLUX_KL, KL, made

from unlearn import config, views
from unlearn.errors import MissingExtra, WeightsError
from unlearn.models import base, folders, weights
from unlearn.models.diffusion import autoencoder, flow, networks, pipeline, prompts
from unlearn.registry import MODELS

import diffusers  # isort: skip  after the cure of torchvision

SHARED = Path(os.environ.get("UNLEARN_SHARED", Path(__file__).parents[3] / "shared" / "data"))
TINY = {
    "class": "AutoencoderTiny", "encoder_block_out_channels": [8] * 2, "decoder_block_out_channels": [8] * 2,
    "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1],
}  # fmt: skip
TAEF2 = {"class": "TAEF2", "width": 8}
VAES = {"AutoencoderKL": KL, "of Flux": FLUX_KL, "AutoencoderTiny": TINY, "TAEF2": TAEF2}
kinds = pytest.mark.parametrize("kind", VAES)


def halves(kind: str):
    """(the whole autoencoder with random weights, first stage and back with the same ones)."""
    torch.manual_seed(0)
    whole = autoencoder.whole(VAES[kind]).eval()
    parts = torch.nn.ModuleDict(zip(("first_stage", "back"), autoencoder.split(VAES[kind]), strict=True)).eval()
    ours = autoencoder.from_public(whole.state_dict())
    parts.load_state_dict({n.removeprefix("decoder."): t for n, t in ours.items()})
    assert autoencoder.to_public(ours).keys() == whole.state_dict().keys() and all(
        n.startswith(autoencoder.AUTOENCODER_TENSORS) for n in ours
    )
    return whole, parts["first_stage"], parts["back"]


def view_of(rows: int, size: float = 0.5) -> views.View:
    return views.draw([config.ViewSpec(kind="box", size=size)], 4, rows, np.random.default_rng(0))


@kinds
@torch.no_grad()
def test_latents_are_those_that_the_pipeline_of_diffusers_computes(kind):
    whole, first_stage, back = halves(kind)
    images, view = torch.rand(3, 3, 32, 32) * 2 - 1, view_of(3)
    torch.manual_seed(1)
    found = first_stage(images, view)
    grey = torch.where(view.pixel_mask(32), 0, images)
    if kind == "TAEF2":
        expected = [whole.encoder((x + 1) / 2) / 0.853 for x in (images, grey)]
        restored = whole.decoder(found[:, :32] * 0.853) * 2 - 1
    elif kind == "AutoencoderTiny":
        expected = [whole.encode(x).latents for x in (images, grey)]
        restored = whole.decode(found[:, :4]).sample
    else:
        shift, scale = (0.1159, 0.3611) if kind == "of Flux" else (0, 0.18215)
        expected = [(whole.encode(x).latent_dist.mode() - shift) * scale for x in (images, grey)]
        restored = whole.decode(found[:, :4] / scale + shift).sample
    torch.testing.assert_close(found, torch.cat(expected, dim=1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(back(expected[0]), restored, atol=1e-5, rtol=1e-5)
    assert autoencoder.noised_space(VAES[kind]) == (found.shape[1] // 2, 32 // found.shape[2])
    assert not any(p.requires_grad for half in (first_stage, back) for p in half.parameters())
    # latents of the known part do not depend on what is hidden
    changed = torch.where(view.pixel_mask(32), torch.rand_like(images), images)
    known = slice(found.shape[1] // 2, None)
    assert torch.equal(first_stage(changed, view)[:, known], found[:, known]) and not torch.equal(
        first_stage(changed, view), found
    )


@torch.no_grad()
def test_images_under_several_views_are_encoded_once(monkeypatch):
    _, first_stage, _ = halves("TAEF2")
    images, seen, latents_of = torch.rand(2, 3, 32, 32), [], first_stage.latents
    monkeypatch.setattr(first_stage, "latents", lambda x: (seen.append(x), latents_of(x))[1])
    found = [first_stage(images, view_of(2, size)) for size in (0.25, 0.5, 0.75)]
    assert len(seen) == 4 and all(
        torch.equal(f, first_stage(images.clone(), view_of(2, s)))
        for f, s in zip(found, (0.25, 0.5, 0.75), strict=True)
    )
    first_stage(images, view_of(2))
    images.mul_(0.5)  # changed in place they are other images
    expected = first_stage(images.clone(), view_of(2))
    assert torch.equal(first_stage(images, view_of(2)), expected)
    with torch.inference_mode():
        assert torch.equal(first_stage(images.clone(), view_of(2)), expected)


def test_channels_with_statistics_of_their_own():
    scaling = autoencoder.Scaling({"scaling_factor": 0.5, "latents_mean": [1.0, -1.0], "latents_std": [2.0, 4.0]})
    values = torch.tensor([3.0, 3.0]).view(1, 2, 1, 1)
    assert scaling(values).flatten().tolist() == [0.5, 0.5]  # (value - mean) x factor / std
    assert torch.equal(scaling.inverse(scaling(values)), values)


def test_the_back_takes_the_type_of_its_weights():
    _, _, back = halves("AutoencoderKL")
    assert back.to(torch.bfloat16)(torch.randn(1, 4, 4, 4)).dtype == torch.bfloat16


def test_an_unknown_autoencoder_is_told():
    with pytest.raises(
        ValueError, match="vae.class 'VQModel' is not known; known: AutoencoderKL, AutoencoderTiny, TAEF2"
    ):
        autoencoder.split({"class": "VQModel"})


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """(8, 3, 128, 128) in [-1, 1]: one photograph of each of some classes of SUN-25."""
    if (
        not (SHARED / "sun_scenes_256.tar").is_file()
        or not (SHARED / "weights" / "taef2_encoder.safetensors").is_file()
    ):
        pytest.skip(
            f"no sun_scenes_256.tar and weights of TAEF2 in {SHARED}: set UNLEARN_SHARED to the folder that holds them"
        )
    found = {}
    with tarfile.open(SHARED / "sun_scenes_256.tar") as tar:
        for member in tar:
            name = Path(member.name).parent.name
            if member.isfile() and name not in found:
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB").resize((128, 128))
                found[name] = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
            if len(found) == 8:
                break
    return torch.stack(list(found.values()))


@torch.no_grad()
def test_taef2_restores_real_photographs(photographs):
    """29.0 dB on average; without the soft clamp 26.3, with pixels in [-1, 1] 19.9."""
    first_stage, back = autoencoder.split({"class": "TAEF2"})
    parts = torch.nn.ModuleDict({"first_stage": first_stage, "back": back})
    found = autoencoder.first_stage_from(SHARED / "weights")
    parts.load_state_dict({n.removeprefix("decoder."): t for n, t in found.items()})
    codes = first_stage(photographs, view_of(len(photographs)))[:, :32]
    assert codes.shape == (8, 32, 16, 16) and abs(codes.mean()) < 0.15 and abs(codes.std() - 1) < 0.1
    error = ((back(codes).clamp(-1, 1) - photographs) / 2).square().mean((1, 2, 3))
    assert (-10 * error.log10()).mean() > 28.5


class Toy(base.Adapter):
    """A first stage and a decoder that `model.first_stage` fills."""

    family = "toy"
    first_stage_names = autoencoder.AUTOENCODER_TENSORS

    def __init__(self, options):
        super().__init__(options)
        self.encoder, self.decoder = torch.nn.Conv2d(8, 2, 1), torch.nn.Conv2d(2, 4, 1)
        self.first_stage, self.decoder.back = autoencoder.split(TAEF2)

    first_stage_from = staticmethod(autoencoder.first_stage_from)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A folder with TAEF2's two files, for the family toy."""
    monkeypatch.setitem(MODELS.entries, "toy", f"{__name__}:Toy")
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Toy=Toy))
    torch.manual_seed(3)
    whole = autoencoder.whole(TAEF2)
    for half, name in autoencoder.TAEF2_FILES.items():
        save_file({n: t.half() for n, t in getattr(whole, half).state_dict().items()}, tmp_path / name)
    return tmp_path


def test_the_first_stage_in_a_folder_of_its_own_fills_both_halves(toy):
    expected = autoencoder.first_stage_from(toy)
    start = weights.build(config.Model(family="toy"), 1)
    built = weights.build(config.Model(family="toy", first_stage=str(toy)), 1)
    own, before = built.state_dict(), start.state_dict()
    assert all(torch.equal(own[n], expected[n].float() if n in expected else before[n]) for n in own) and len(
        expected
    ) < len(own)
    # over weights of a model that has another one
    weights.write(start, str(toy / "model"), {})
    again = weights.build(config.Model(family="toy", weights=str(toy / "model"), first_stage=str(toy)), 2).state_dict()
    assert all(torch.equal(again[n], own[n]) for n in own)
    # of a model that lacks one
    save_file({n: t for n, t in before.items() if n not in expected}, toy / "rest.safetensors")
    again = weights.build(
        config.Model(family="toy", weights=str(toy / "rest.safetensors"), first_stage=str(toy)), 2
    ).state_dict()
    assert all(torch.equal(again[n], own[n]) for n in own)
    with pytest.raises(
        WeightsError, match="lacks the frozen first stage of toy: name its weights in model.first_stage"
    ):
        weights.build(config.Model(family="toy", weights=str(toy / "rest.safetensors")))


def test_a_first_stage_that_is_not_whole_is_told(toy, tmp_path):
    path = toy / autoencoder.TAEF2_FILES["decoder"]
    kept = load_file(path)
    save_file({n: t for n, t in kept.items() if n != "19.bias"}, path)
    with pytest.raises(WeightsError, match="missing decoder.back.decoder.19.bias"):
        weights.build(config.Model(family="toy", first_stage=str(toy)))
    path.unlink()
    with pytest.raises(WeightsError, match="lacks taef2_decoder.safetensors: both halves"):
        autoencoder.first_stage_from(toy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="holds no autoencoder: give a folder of diffusers"):
        autoencoder.first_stage_from(tmp_path / "empty")


def test_files_of_half_precision_in_parts_and_with_old_names_are_read(tmp_path):
    torch.manual_seed(0)
    whole = diffusers.AutoencoderKL(**{n: v for n, v in KL.items() if n != "class"})
    expected = autoencoder.from_public(whole.state_dict())
    whole.save_pretrained(tmp_path / "one")
    whole.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    whole.save_pretrained(tmp_path / "bin", safe_serialization=False)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    held = load_file(tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    for ours, theirs in old.items():
        held = {n.replace(f".{ours}.", f".{theirs}.") if ".attentions." in n else n: t for n, t in held.items()}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    save_file(held, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    for name in ("one", "parts", "bin", "old"):
        found = autoencoder.first_stage_from(tmp_path / name)
        assert found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items()), name
    whole.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert autoencoder.first_stage_from(tmp_path / "half")["first_stage.encoder.conv_in.weight"].dtype == torch.float16
    whole.save_pretrained(tmp_path / "half-parts", variant="fp16", max_shard_size="10KB")
    assert autoencoder.first_stage_from(tmp_path / "half-parts").keys() == expected.keys()
    next((tmp_path / "parts").glob("*.safetensors")).unlink()
    with pytest.raises(WeightsError, match="lacks diffusion_pytorch_model-.*: give a whole folder as save_pretrained"):
        folders.tensors(tmp_path / "parts")
    (tmp_path / "one" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json is damaged"):
        folders.config(tmp_path / "one" / "config.json")


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
    images, view = torch.rand(2, 3, 32, 32) * 2 - 1, view_of(2)

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
        pipeline.write({}, SimpleNamespace(network={"class": "UNet2DConditionModel"}, vae=TAEF2), tmp_path)


@pytest.mark.parametrize(
    "settings, shift", [({}, 1.0), ({"shift": 3.0}, 3.0), ({"use_dynamic_shifting": True}, np.exp(0.5))]
)
def test_flow_matching_is_what_its_scheduler_undoes(settings, shift):
    made, device = flow.FlowMatching(settings, 256), torch.device("cpu")
    clean, eps = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    sampler = made.sampler("", 5, device)
    s = np.linspace(1, 0.2, 5)
    np.testing.assert_allclose(sampler.timesteps, 1000 * shift * s / (1 + (shift - 1) * s), rtol=1e-5)
    noisy = made.noised(clean, eps, sampler.timesteps)
    reference = sampler.scale_noise(clean, sampler.timesteps, eps)
    torch.testing.assert_close(noisy, reference, atol=1e-6, rtol=1e-6)
    # the true velocity leads from noise to the clean image
    x = eps[:1]
    for t in sampler.timesteps:
        x = sampler.step(made.target(clean[:1], eps[:1], t.expand(1)), t, x).prev_sample
    torch.testing.assert_close(x.double(), clean[:1], atol=1e-5, rtol=1e-5)
    t = made.times(4000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1000
    assert float((t / 1000).median()) == pytest.approx(shift / (1 + shift), abs=0.02)


@pytest.mark.parametrize(
    "settings", [{"time_shift_type": "linear"}, {"stochastic_sampling": True}, {"invert_sigmas": True}]
)
def test_other_flows_are_refused(settings):
    with pytest.raises(ValueError, match="only exponential time shifts"):
        flow.FlowMatching(settings, 256)
