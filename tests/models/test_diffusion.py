"""Diffusion in pixel space against diffusers' whole network and formulas written anew, in float64."""

import json

import diffusers
import numpy as np
import pytest
import torch
from support import runs
from support.models import SMALL
from support.runs import export, worker

from unlearn import config, views
from unlearn.data.loader import Batch
from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, folders, weights
from unlearn.models.diffusion import adapter as diffusion
from unlearn.models.diffusion import unet
from unlearn.models.diffusion.shapes import LINEAR
from unlearn.planning.shape import model_options

OPTIONS = SMALL["diffusion_pixel"][1]
NETWORK = {name: value for name, value in OPTIONS["network"].items() if name != "class"}
SIDE, GRID = OPTIONS["image_size"], OPTIONS["grid"]
COSINE = {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2"}

NETWORKS = {
    "small": NETWORK,
    "palette": {
        **NETWORK, "down_block_types": ["ResnetDownsampleBlock2D"] * 2, "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
        "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4, "layers_per_block": 2,
    },
    "attention": {
        **NETWORK, "down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2,
        "downsample_type": "resnet",
        "upsample_type": "resnet", "center_input_sample": True, "dropout": 0.5, "block_out_channels": [8, 24],
    },
    "three levels": {
        **NETWORK, "block_out_channels": [8, 8, 16], "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "add_attention": False,
    },
}  # fmt: skip


def build(seed: int = 1, **options) -> diffusion.Diffusion:
    return weights.build(config.Model(family="diffusion", options={**OPTIONS, **options}), seed)


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def view_of(rows: int, kind: str = "box", size: float = 0.5) -> views.View:
    return views.draw([config.ViewSpec(kind=kind, size=size)], GRID, rows, np.random.default_rng(0))


def whole(model: diffusion.Diffusion) -> diffusers.UNet2DModel:
    """diffusers' own model with the same weights."""
    made = diffusers.UNet2DModel(**NETWORK)
    made.load_state_dict(unet.to_public(model.state_dict()))
    return made.to(next(model.parameters()).dtype).eval()


def alphas(schedule: dict) -> np.ndarray:
    """Products of 1 - beta, from the formulas of the papers."""
    count = schedule["num_train_timesteps"]
    if schedule["beta_schedule"] == "linear":
        return np.cumprod(1 - np.linspace(schedule["beta_start"], schedule["beta_end"], count))
    f = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parts_compute_what_the_whole_network_computes(name):
    torch.manual_seed(0)
    reference = diffusers.UNet2DModel(**NETWORKS[name]).eval()
    parts = dict(zip(("encoder", "decoder", "shared"), unet.split(NETWORKS[name]), strict=True))
    public = reference.state_dict()
    ours = {f"{part}.{n}": t for part, module in parts.items() for n, t in module.state_dict().items()}
    assert unet.to_public(ours).keys() == public.keys()
    for part, module in parts.items():
        module.load_state_dict(
            {n.removeprefix(f"{part}."): t for n, t in unet.from_public(public).items() if n.startswith(f"{part}.")}
        )
        module.train()  # dropout, where the config has it, is left out
    sample, t = randn(2, 6, SIDE, SIDE), torch.tensor([3, 700])
    with torch.no_grad():
        emb, context = parts["shared"](t, sample.dtype)
        levels = parts["encoder"](sample, emb, context)
        found = parts["decoder"](levels, emb, context)
        torch.testing.assert_close(found, reference(sample, t).sample, atol=1e-6, rtol=1e-6)
    blocks, layers = len(NETWORKS[name]["block_out_channels"]), NETWORKS[name]["layers_per_block"]
    assert len(levels) == 1 + blocks * layers + (blocks - 1) + 1 and len({id(level) for level in levels}) == len(levels)


@pytest.mark.parametrize("change",
    [{"time_embedding_type": "fourier"}, {"num_class_embeds": 3}, {"mid_block_type": None},
                                    {"down_block_types": ["SkipDownBlock2D"] * 2}, {"down_block_types": ["Magic"] * 2},
                                    {"depth": 3}])  # fmt: skip
def test_a_network_that_cannot_be_cut_is_an_error(change):
    with pytest.raises(ConfigError, match="model.options: diffusers cannot build this network"):
        build(network={**OPTIONS["network"], **change})


def test_checkpointed_activations_give_the_same_gradients():
    model, view, images = build(), view_of(2), randn(2, 3, SIDE, SIDE)
    found = []
    for on in (False, True):
        model.encoder.activation_checkpointing = on
        embedding = model.encode(images, view, 1)
        assert all(level.requires_grad for level in embedding)
        sum(level.square().mean() for level in embedding).backward()
        found.append({n: p.grad.clone() for n, p in model.encoder.named_parameters()})
        model.zero_grad()
        assert all(
            block.gradient_checkpointing == on for block in (*model.encoder.down_blocks, model.encoder.mid_block)
        )
    assert all(torch.equal(gradient, found[1][n]) for n, gradient in found[0].items())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_the_loss_is_the_formulas(prediction, schedule, monkeypatch):
    model = build(scheduler={**schedule, "prediction_type": prediction}).double()
    view, images = view_of(3, "brush", 0.4), randn(3, 3, SIDE, SIDE, seed=1, dtype=torch.float64)
    condition, eps = randn(2, *images.shape, seed=2, dtype=torch.float64)
    t = torch.tensor([0, 17, schedule["num_train_timesteps"] - 1])
    monkeypatch.setattr(diffusion, "_noise", lambda inputs, seed: (condition, eps))
    monkeypatch.setattr(model.noising, "times", lambda rows, generator: t)
    a = torch.from_numpy(alphas(schedule))[t].view(3, 1, 1, 1)
    hole = view.pixel_mask(SIDE).double()
    noisy = a.sqrt() * images + (1 - a).sqrt() * eps
    sample = torch.cat([condition * hole + images * (1 - hole), noisy * hole + images * (1 - hole)], dim=1)
    wanted = {"epsilon": eps, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * images, "sample": images}[prediction]
    with torch.no_grad():
        error = ((whole(model)(sample, t).sample - wanted) ** 2 * hole).sum() / (3 * hole.sum())
        # diffusers keeps its table in float32, whose error is largest where the signal is nearly gone
        torch.testing.assert_close(model.training_loss(images, view, 0), error, rtol=1e-5, atol=0)


def test_times_and_noise_are_uniform_and_standard_and_none_is_the_methods():
    model, images = build(), randn(400, 3, 8, 8)
    t = model.noising.times(4000, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 1999 and abs(t.double().mean() - 999.5) < 30
    condition, eps = diffusion._noise(images, 5)
    method = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    for a, b in ((condition, eps), (condition, method), (eps, method)):
        assert abs(a.mean()) < 0.02 and abs(a.std() - 1) < 0.02 and abs((a * b).mean()) < 0.02
    # Nor the same numbers elsewhere; a few are equal by chance.
    assert torch.isin(condition, method).double().mean() < 0.1


def fed(model: diffusion.Diffusion) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(sample, emb) of every call of the encoder from now on."""
    calls = []
    model.encoder.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[:2]))
    return calls


@pytest.mark.parametrize("region", [None, "hole", "image"])
def test_teacher_and_student_see_the_same_but_for_the_noise(region):
    """method.noise_region: where the teacher's image is noise; by default in the hole."""
    student, teacher, view = build(1), build(1), view_of(6)
    images, retain = randn(6, 3, SIDE, SIDE).clamp(-1, 1), 3
    seen, taught = fed(student), fed(teacher)
    runs.losses(runs.method(noise_region=region), Batch(images, view, retain, 9), student, teacher)
    (sample, emb), (target, target_emb) = seen[0], taught[0]
    assert torch.equal(emb, target_emb) and len({tuple(row) for row in emb.tolist()}) > 1
    assert torch.equal(sample[:retain], target[:retain])
    sample, target, clean = sample[retain:], target[retain:], images[retain:]
    hole = view.pixel_mask(SIDE)[retain:].expand_as(clean)
    for part in (sample[:, :3], sample[:, 3:]):
        assert torch.equal(part[~hole], clean[~hole])
    # the condition holds the same noise; what is noised is the image for the student and noise for the teacher
    assert torch.equal(sample[:, :3][hole], target[:, :3][hole])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    t = student.noising.times(6, diffusion._generator(9, 1, torch.device("cpu")))[retain:]
    signal = torch.from_numpy(alphas(LINEAR))[t].sqrt().float().view(-1, 1, 1, 1)
    expected = (signal * (noise - clean))[hole]
    torch.testing.assert_close((target[:, 3:] - sample[:, 3:])[hole], expected, atol=1e-4, rtol=1e-3)
    outside = noise if region == "image" else clean
    for part in (target[:, :3], target[:, 3:]):
        assert torch.equal(part[~hole], outside[~hole])


def ddim(model: diffusion.Diffusion, images: torch.Tensor, view: views.View, steps: int) -> torch.Tensor:
    """DDIM with eta 0 from the last timestep (arXiv 2010.02502), float64; noise is predicted, images are clipped to -1
    .. 1."""
    a, network, count = alphas(LINEAR), whole(model), LINEAR["num_train_timesteps"]
    hole = view.pixel_mask(SIDE)
    condition, x = (n.expand_as(images) for n in diffusion._noise(images[:1], 0))
    times = [round(count - n * count / steps) - 1 for n in range(steps)]
    for t, then in zip(times, [*times[1:], None], strict=True):
        sample = torch.cat([torch.where(hole, condition, images), torch.where(hole, x, images)], dim=1)
        eps = network(sample, torch.tensor(t)).sample
        clean = ((x - (1 - a[t]) ** 0.5 * eps) / a[t] ** 0.5).clamp(-1, 1)
        x = clean if then is None else a[then] ** 0.5 * clean + (1 - a[then]) ** 0.5 * eps
    return torch.where(hole, x, images)


@torch.no_grad()
def test_sampling_is_ddim_with_the_known_pixels_in_every_step():
    model, view = build(sampling_steps=4).double(), view_of(3)
    images = randn(3, 3, SIDE, SIDE, dtype=torch.float64).clamp(-1, 1)
    calls, hole = fed(model), view.pixel_mask(SIDE).expand(3, 3, SIDE, SIDE)
    torch.manual_seed(0)
    found = model.reconstruct(images, view)
    torch.manual_seed(1)
    assert torch.equal(found, model.reconstruct(images, view))
    torch.testing.assert_close(found, ddim(model, images, view, 4), atol=1e-4, rtol=1e-4)
    assert len(calls) == 8 and found[hole].std() > 0.1
    for sample, _ in calls:
        assert torch.equal(sample[:, :3][~hole], images[~hole]) and torch.equal(sample[:, 3:][~hole], images[~hole])
    # an image's filling does not depend on the others of its batch
    torch.testing.assert_close(found[1:2], model.reconstruct(images[1:2], view.rows(1, 2)), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_another_sampler_by_option():
    model, view, images = build(sampler="DPMSolverMultistepScheduler"), view_of(2), randn(2, 3, SIDE, SIDE)
    assert model.reconstruct(images, view).isfinite().all()
    with pytest.raises(ConfigError, match="model.options.sampler: Input should be 'DDIMScheduler'"):
        build(sampler="Magic")


def test_unlearning_moves_the_encoder_alone(tiny_run, tmp_path):
    start = str(tmp_path / "start")
    weights.write(build(), start, {})
    run = tiny_run(f"model.weights={start}", "model.family=diffusion", "method.alpha=1")
    worker(run)
    before, after = (weights.read(uri)[0] for uri in (start, export(run)))
    moved = {name for name, tensor in before.items() if tensor.numpy().tobytes() != after[name].numpy().tobytes()}
    assert before.keys() == after.keys() and {name.split(".")[0] for name in before} == {"encoder", "decoder", "shared"}
    assert moved == {name for name in before if name.startswith("encoder.")}
    # pretraining does not move the embedding of time either
    assert not any(p.requires_grad for p in build().shared.parameters())


def test_bf16_inputs_stay_bf16():
    model, view = build().to(torch.bfloat16), view_of(2)
    images = randn(2, 3, SIDE, SIDE).to(torch.bfloat16)
    assert {level.dtype for level in model.encode(images, view, 1)} == {torch.bfloat16}
    assert model.training_loss(images, view, 1).dtype == torch.float32


def test_palette_has_the_published_size():
    """62.6 M parameters; 102 GFLOP in encoder and middle at 256 px."""
    with torch.device("meta"):
        model = diffusion.Diffusion(diffusion.DiffusionOptions())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(62.6e6, rel=0.01)
    assert model.flops(view_of(1)) == pytest.approx(102e9, rel=0.01)
    for name in diffusion.Diffusion.variants:
        assert base.options(config.Model(family="diffusion", variant=name)).image_size % 32 == 0


@pytest.fixture
def folder(tmp_path):
    """(model, a pipeline folder of it)."""
    model = build(3, scheduler={**COSINE, "prediction_type": "v_prediction"})
    model.to_folder(tmp_path / "pipeline")
    return model, tmp_path / "pipeline"


def test_a_pipeline_folder_is_diffusers_own(folder):
    model, path = folder
    back = diffusers.UNet2DModel.from_pretrained(path / "unet", use_safetensors=True)
    public = unet.to_public(model.state_dict())
    assert back.state_dict().keys() == public.keys() and all(
        torch.equal(t, public[n]) for n, t in back.state_dict().items()
    )
    scheduler = diffusers.DiffusionPipeline.from_pretrained(path).scheduler
    np.testing.assert_allclose(scheduler.alphas_cumprod, alphas(COSINE), atol=1e-6)
    assert scheduler.config.prediction_type == "v_prediction"


def test_folders_of_diffusers_are_loaded(folder, tmp_path):
    model, path = folder
    images, view = randn(2, 3, SIDE, SIDE), view_of(2)
    wanted = model.training_loss(images, view, 4)
    settings = {"family": "diffusion", "options": {"grid": GRID, "image_size": SIDE}}
    assert torch.equal(
        weights.build(config.Model(weights=str(path), **settings)).training_loss(images, view, 4), wanted
    )

    # the network alone: in one file, in parts, and as an older .bin; its scheduler is told by options
    settings["options"]["scheduler"] = model.options.scheduler
    network = diffusers.UNet2DModel(**NETWORK, sample_size=SIDE)
    network.load_state_dict(unet.to_public(model.state_dict()))
    network.save_pretrained(tmp_path / "one")
    network.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    network.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1 and not list(
        (tmp_path / "bin").glob("*.safetensors")
    )
    for name in ("one", "parts", "bin"):
        built = weights.build(config.Model(weights=str(tmp_path / name), **settings))
        assert built.options.image_size == SIDE and torch.equal(built.training_loss(images, view, 4), wanted)
        assert model_options(config.Model(weights=str(tmp_path / name), **settings))[0] == built.options


def test_folders_that_do_not_fit_are_told(folder, tmp_path):
    _, path = folder
    config_file, file = path / "unet" / "config.json", path / "unet" / f"{folders.FILE}.safetensors"
    kept = config_file.read_text(), file.read_bytes()

    def told(message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            weights.build(
                config.Model(family="diffusion", weights=str(path), options={"grid": GRID, "image_size": SIDE})
            )
        config_file.write_text(kept[0])
        file.write_bytes(kept[1])

    config_file.write_text(json.dumps(json.loads(kept[0]) | {"in_channels": 3}))
    told("unet: the UNet2DModel takes 3 channels and gives 3: one that fills in holes takes 6")
    config_file.write_text(json.dumps(json.loads(kept[0]) | {"_class_name": "UNet1DModel"}))
    told("network.class 'UNet1DModel' is not known; known: UNet2DModel")
    config_file.write_text(json.dumps(json.loads(kept[0]) | {"block_out_channels": [8, 8]}))
    told("does not fit the model")
    config_file.write_text("{")
    told("config.json is damaged")
    config_file.unlink()
    told("config.json is missing")
    file.write_bytes(kept[1][:-100])
    told("cannot be read as weights")
    file.unlink()
    told("lacks diffusion_pytorch_model.safetensors")
    file.unlink()
    file.with_suffix(".safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}})
    )
    told("lacks part-1.safetensors, part-2.safetensors")
    (path / "scheduler" / "scheduler_config.json").unlink()
    told("scheduler_config.json is missing")
