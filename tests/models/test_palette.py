"""The diffusion checkpoint of Palette's code: what it computes, and the way there and back."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.runs import export, tiny_config, worker

from unlearn import config
from unlearn.errors import WeightsError
from unlearn.models import base, weights
from unlearn.models.diffusion import palette
from unlearn.models.diffusion.shapes import LINEAR

SHARED = Path(os.environ.get("UNLEARN_SHARED", Path(__file__).parents[3] / "shared" / "data")) / "weights"
FILE = SHARED / "palette_small_Network.pth"
OPTIONS = {"image_size": 32, "grid": 8, "sampling_steps": 2}


@pytest.fixture(scope="module")
def public() -> dict[str, torch.Tensor]:
    if not FILE.is_file():
        pytest.skip(f"no {FILE.name} in {SHARED}: set UNLEARN_SHARED to the folder above that holds it")
    return torch.load(FILE, weights_only=True)


def build(path=FILE):
    return weights.build(config.Model(family="diffusion", weights=str(path), options=OPTIONS))


@torch.no_grad()
def test_all_levels_and_the_output_are_those_of_palette(public):
    model, reference = build(), np.load(SHARED / "palette_small_reference.npz")
    assert model.options.conditioning == "gamma" and model.options.scheduler == LINEAR
    sample, t = (torch.from_numpy(reference[name]) for name in ("input", "t"))
    torch.testing.assert_close(model.noising.told(t), torch.from_numpy(reference["gamma"]).view(-1), rtol=1e-6, atol=0)
    levels = model.encoder(sample, *model.shared(model.noising.told(t), torch.float32))
    assert len(levels) == 10
    for n, level in enumerate(levels):
        torch.testing.assert_close(level, torch.from_numpy(reference[f"level_{n:02d}"]), rtol=1e-5, atol=1e-5)
    output = torch.from_numpy(reference["output"])
    torch.testing.assert_close(model._predict(sample, t), output, rtol=1e-5, atol=1e-5)
    told_t = weights.build(
        config.Model(family="diffusion", weights=str(FILE), options={**OPTIONS, "conditioning": "timestep"})
    )
    assert (told_t._predict(sample, t) - output).norm() > 0.1 * output.norm()  # the comparison can fail


def test_gamma_is_drawn_between_the_levels_of_two_timesteps(public):
    noising = build().noising
    t = noising.times(4000, torch.Generator().manual_seed(0))
    gamma, table = noising.told(t), public["gammas"]
    low = t.long()
    assert ((gamma <= table[low]) & (gamma >= table[low + 1])).all() and low.min() < 20 and low.max() > 1978
    clean, eps = torch.ones(4000, 1, 1, 1), torch.zeros(4000, 1, 1, 1)
    torch.testing.assert_close(noising.noised(clean, eps, t).flatten(), gamma.sqrt())


def test_it_is_imported_unlearned_and_written_back(public, tiny_shards, tmp_path):
    settings = tiny_config(
        tmp_path / "run", tiny_shards, str(FILE), "model.family=diffusion", f"model.options={OPTIONS}",
        "training.steps=1", "training.batch_size=4",
    )  # fmt: skip
    worker(settings)
    weights.convert(config.Model(family="diffusion", weights=export(settings)), str(tmp_path / "theirs"))
    back = torch.load(tmp_path / "theirs" / palette.FILE, weights_only=True)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in public.items()}
    moved = {n.split(".")[1] for n, t in back.items() if n.startswith("denoise_fn.") and not torch.equal(t, public[n])}
    assert moved == {
        "input_blocks",
        "middle_block",
    }  # the encoder; the way up and the embedding of gamma are as they were
    assert torch.allclose(back["gammas"], public["gammas"], rtol=1e-5)
    again = build(tmp_path / "theirs" / palette.FILE).state_dict()
    trained = build(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(t, trained[n]) for n, t in again.items())


def test_names_mapped_by_hand_say_nothing_of_gamma_so_it_is_asked(public, tmp_path, logged):
    base.tell.cache_clear()
    mapped = palette.to_diffusers(public)
    network = {"network": palette.options(public)["network"]}

    def load(tensors, **options):
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "w.safetensors")
        weights_of = config.Model(
            family="diffusion", weights=str(tmp_path / "w.safetensors"), options=OPTIONS | network | options
        )
        return weights.build(weights_of).options.conditioning

    assert load(mapped, conditioning="gamma") == "gamma" and load(mapped | {"gammas": public["gammas"]}) == "gamma"
    assert "conditioning" not in logged.text
    assert load(mapped) == "timestep"
    assert "set model.options.conditioning to timestep or gamma" in logged.text


def test_a_schedule_that_is_missing_or_none_is_told(public, logged):
    base.tell.cache_clear()
    told = {name: tensor for name, tensor in public.items() if name != "gammas"}
    assert palette.options(told)["scheduler"] == palette.LINEAR and "without its `gammas`" in logged.text
    for dtype in (torch.float16, torch.bfloat16):
        assert palette.options(told | {"gammas": public["gammas"].to(dtype)})["scheduler"] == palette.LINEAR
    for gammas in (public["gammas"] * float("nan"), public["gammas"].flip(0), public["gammas"][None]):
        with pytest.raises(WeightsError, match="`gammas` of this Palette file are no schedule"):
            palette.options(told | {"gammas": gammas})


def test_another_schedule_is_read_to_all_digits(public):
    expected = palette._buffers(torch.linspace(1e-6, 0.02, 1000, dtype=torch.float64))
    scheduler = palette.options(public | expected)["scheduler"]
    for name, tensor in palette._buffers(palette._betas(scheduler)).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-7)
    rounded = {name: tensor.half() for name, tensor in (public | expected).items()}
    with pytest.raises(WeightsError, match="rounded to 16 bits.*give the schedule as model.options.scheduler"):
        palette.options(rounded)
    assert palette.options(rounded, scheduled=True)["conditioning"] == "gamma"


def test_the_network_alone_is_the_same(public, tmp_path, logged):
    base.tell.cache_clear()
    alone = {name.removeprefix(palette.ROOT): t for name, t in public.items() if name.startswith(palette.ROOT)}
    for name, tensors in {"alone": alone, "with_schedule": alone | {"gammas": public["gammas"]}}.items():
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"{name}.safetensors")
        model, whole = build(tmp_path / f"{name}.safetensors"), build()
        assert model.options.conditioning == "gamma"
        assert all(torch.equal(t, whole.state_dict()[n]) for n, t in model.state_dict().items())
    assert logged.text.count("without its `gammas`") == 1


def test_half_a_file_is_told(public, tmp_path):
    torch.save({n: t for n, t in public.items() if "input_blocks.0.0" not in n}, tmp_path / "a_Network.pth")
    with pytest.raises(WeightsError, match="lacks a part of its network"):
        build(tmp_path / "a_Network.pth")
    wrapped = {n.replace("denoise_fn.", "denoise_fn.module."): t for n, t in public.items()}
    assert palette.to_diffusers(wrapped).keys() == palette.to_diffusers(public).keys()
    del wrapped["denoise_fn.module.input_blocks.4.0.out_layers.3.weight"]
    with pytest.raises(WeightsError, match="lacks a part of its network .'input_blocks.4"):
        palette.options(wrapped)
