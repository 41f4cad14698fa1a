"""The family diffusion on an autoencoder's latents: the same adapter with a first stage, for UNets and transformers."""

import diffusers
import numpy as np
import pytest
import torch
from support import runs
from support.models import SMALL

from unlearn import config, views
from unlearn.data.loader import Batch
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.models import weights
from unlearn.models.diffusion import adapter as diffusion
from unlearn.models.diffusion import autoencoder, unet_condition
from unlearn.planning.shape import model_options

UNET, FLUX = SMALL["diffusion_latent"][1], SMALL["diffusion_flux"][1]
SIDE, GRID = 32, 4
KL = {
    "class": "AutoencoderKL", "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4, "scaling_factor": 0.5,
}  # fmt: skip


def build(options: dict, seed: int = 1, **changes) -> diffusion.Diffusion:
    return weights.build(config.Model(family="diffusion", options={**options, **changes}), seed)


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def view_of(rows: int) -> views.View:
    return views.draw([config.ViewSpec(kind="box", size=0.5)], GRID, rows, np.random.default_rng(0))


def whole_unet(model: diffusion.Diffusion) -> diffusers.UNet2DConditionModel:
    made = diffusers.UNet2DConditionModel(**{n: v for n, v in model.options.network.items() if n != "class"})
    made.load_state_dict(unet_condition.to_public(model.state_dict()))
    return made.to(next(model.parameters()).dtype).eval()


@torch.no_grad()
def test_the_loss_of_a_unet_is_the_formula_over_all_latents(monkeypatch):
    """Stable Diffusion's inpainting: [noised latents, hole, latents of the image with a grey hole]."""
    model, view = build(UNET, seed=2).double(), view_of(3)
    images = randn(3, 3, SIDE, SIDE, seed=1, dtype=torch.float64).clamp(-1, 1)
    hole = view.pixel_mask(SIDE).double()
    model.first_stage.float()
    inputs = model.inputs(images, view).double()
    clean, known = inputs.chunk(2, dim=1)
    torch.testing.assert_close(known, model.first_stage.latents(images * (1 - hole)).double())
    eps, t = randn(*clean.shape, seed=2, dtype=torch.float64), torch.tensor([0, 300, 1999])
    monkeypatch.setattr(diffusion, "_noise", lambda clean, seed: (None, eps))
    monkeypatch.setattr(model.noising, "times", lambda rows, generator: t)
    a = torch.cumprod(1 - torch.linspace(1e-6, 0.01, 2000, dtype=torch.float64), 0)[t].view(3, 1, 1, 1)
    mask = hole[:, :, ::8, ::8]
    sample = torch.cat([a.sqrt() * clean + (1 - a).sqrt() * eps, mask, known], dim=1)
    prompt = model.shared.prompt.expand(3, -1, -1)
    assert prompt.std() > 0.5
    said = whole_unet(model)(sample, t, encoder_hidden_states=prompt).sample
    torch.testing.assert_close(model.training_loss(inputs, view), (said - eps).square().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [UNET, FLUX], ids=["UNet", "Flux"])
@pytest.mark.parametrize("region", ["hole", "image"])
def test_the_teachers_noise_is_in_the_hole_of_the_noised_latents(options, region):
    """What is known of the image stays as it is, unless the noise is everywhere."""
    student, teacher, view = build(options), build(options), view_of(4)
    with torch.no_grad():
        inputs = student.inputs(randn(4, 3, SIDE, SIDE).clamp(-1, 1), view)
    taught = []
    real = teacher.encode
    teacher.encode = lambda *arguments: taught.append(arguments[0]) or real(*arguments)
    runs.losses(runs.method(noise_region=region), Batch(inputs, view, 2, 9), student, teacher)
    assert torch.equal(taught[0][:2], inputs[:2])
    (clean, known), (noise, other) = inputs[2:].chunk(2, dim=1), taught[0][2:].chunk(2, dim=1)
    hole = view.pixel_mask(clean.shape[-1])[2:].expand_as(clean)
    assert not (noise == clean)[hole].any() and abs(noise[hole].std() - 1) < 0.2
    assert torch.equal(noise[~hole], clean[~hole]) == torch.equal(other, known) == (region == "hole")


@torch.no_grad()
@pytest.mark.parametrize("options", [UNET, FLUX], ids=["UNet", "Flux"])
def test_sampling_starts_from_noise_and_ends_in_the_back(options):
    model, view = build(options), view_of(2)
    images, hole = randn(2, 3, SIDE, SIDE).clamp(-1, 1), view.pixel_mask(SIDE)
    samples, decoded = [], []
    model.encoder.register_forward_pre_hook(lambda module, arguments: samples.append(arguments[0]))
    model.decoder.back.register_forward_hook(lambda module, arguments, out: decoded.append((arguments[0], out)))
    found = model.reconstruct(images, view)
    channels, _ = autoencoder.noised_space(model.options.vae)
    start = diffusion._noise(samples[0][:1, :channels], 0)[1]
    assert len(samples) == model.options.sampling_steps and torch.equal(
        samples[0][:, :channels], start.expand(2, -1, -1, -1)
    )
    assert torch.equal(found, torch.where(hole, decoded[0][1], images)) and len(decoded) == 1
    assert not torch.equal(decoded[0][0], samples[-1][:, :channels])


def test_a_saved_transformer_is_loaded_with_another_cut(tmp_path):
    model, view = build(FLUX, seed=3), view_of(2)
    weights.write(model, str(tmp_path), {})
    other = weights.build(config.Model(family="diffusion", weights=str(tmp_path), options={"encoder_blocks": 1}))
    inputs = model.inputs(randn(2, 3, SIDE, SIDE), view)
    assert len(list(other.encoder.parameters())) < len(list(model.encoder.parameters()))
    with torch.no_grad():
        assert torch.equal(model.training_loss(inputs, view, 3), other.training_loss(inputs, view, 3))


def test_a_pipeline_folder_goes_out_and_in(tmp_path, s3):
    model = build(UNET, 4, vae=KL, grid=8, scheduler={"num_train_timesteps": 100, "beta_schedule": "scaled_linear"})
    model.to_folder(tmp_path / "out")
    back = weights.build(
        config.Model(family="diffusion", weights=str(tmp_path / "out"), options={"image_size": SIDE, "grid": 8})
    )
    assert back.options.vae["class"] == "AutoencoderKL" and back.options.tokens == model.options.tokens
    found = back.state_dict()
    assert found.keys() == model.state_dict().keys() and all(
        torch.equal(t, found[n]) for n, t in model.state_dict().items()
    )
    view = views.draw([config.ViewSpec()], 8, 2, np.random.default_rng(0))
    images = randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        inputs = model.inputs(images, view)
        assert torch.equal(model.training_loss(inputs, view, 1), back.training_loss(inputs, view, 1))
    there = config.Model(family="diffusion", weights=s3, options={"image_size": SIDE, "grid": 8})
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        Storage(s3).write(path.relative_to(tmp_path / "out").as_posix(), path.read_bytes())
    assert model_options(there)[0] == back.options and weights.fingerprint(s3) == weights.fingerprint(
        str(tmp_path / "out")
    )
    assert all(torch.equal(t, found[n]) for n, t in weights.build(there).state_dict().items())


@pytest.mark.parametrize("changes, message", [
    ({"vae": None}, "a UNet2DConditionModel works on latents: say in `vae` whose"),
    ({"network": UNET["network"] | {"in_channels": 4}},
        "the UNet2DConditionModel takes 4 channels and gives 4: one that fills in"),
    ({"vae": {"class": "Magic"}}, "vae.class 'Magic' is not known; known: AutoencoderKL"),
    ({"vae": {"class": "TAEF2", "depth": 3}}, "vae: diffusers cannot build it"),
    ({"grid": 8}, "image_size 32 is not a multiple of 64, 8 times the grid of views"),
    ({"image_size": 40, "grid": 5}, "image_size 40 is not a multiple of 16, what the network divides a side by"),
])  # fmt: skip
def test_options_that_do_not_fit_each_other_are_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(UNET, **changes)
