"""Latent models as people have them: whole pipelines, parts of them, single files; and what is no such model."""

import json
import re
import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pipelines import KL, UNET, XL, made

from unlearn import config
from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, weights
from unlearn.models.diffusion import autoencoder, noising, pipeline, prompts, unet_condition

import diffusers  # isort: skip  after the cure of torchvision
import transformers  # isort: skip

SMALL = {"grid": 4, "image_size": 32, "sampling_steps": 2}


def build(path, first_stage=None, **options):
    uri = None if first_stage is None else str(first_stage)
    return weights.build(config.Model(family="diffusion", weights=str(path), first_stage=uri, options=SMALL | options))


def same(model, other) -> bool:
    found, expected = model.state_dict(), other.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder of a whole pipeline of Stable Diffusion's kind."""
    folder = tmp_path_factory.mktemp("pipeline") / "theirs"
    made("sd").save_pretrained(folder)
    return folder


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("kind", ["sd", "xl", "flux"])
def test_a_converted_folder_loads_in_the_line_that_is_told(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "theirs")
    weights.write(build(tmp_path / "theirs"), str(tmp_path / "run"), {"from": str(tmp_path / "theirs")})
    for source, name in (("theirs", "a"), ("run", "b")):
        line = weights.convert(config.Model(family="diffusion", weights=str(tmp_path / source)), str(tmp_path / name))
        back = eval(line, {"diffusers": diffusers})  # the line itself is what is tested
        assert all(getattr(back, part) is not None for part in prompts.TEXT if hasattr(back, part))
    shutil.rmtree(tmp_path / "theirs")
    line = weights.convert(config.Model(family="diffusion", weights=str(tmp_path / "run")), str(tmp_path / "c"))
    assert "text_encoder=None" in line and eval(line, {"diffusers": diffusers}).text_encoder is None


@pytest.mark.parametrize("scheduler, clipped", [({}, False), ({"clip_sample": True}, True)])
def test_latents_are_not_clipped_unless_the_scheduler_says_so(scheduler, clipped, theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    named = {n: v for n, v in json.loads(path.read_text()).items() if n != "clip_sample"}
    path.write_text(json.dumps(named | scheduler))
    weights.convert(config.Model(family="diffusion", weights=str(folder)), str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert written["clip_sample"] is clipped


def test_a_pipeline_that_does_something_else_is_refused(tmp_path):
    """Its UNet has the channels of one that fills in holes on pixels."""
    unet = diffusers.UNet2DModel(
        in_channels=6, out_channels=3, block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=1,
        sample_size=32,
        down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
    )  # fmt: skip
    vqvae = diffusers.VQModel(block_out_channels=[8], norm_num_groups=4)
    diffusers.LDMSuperResolutionPipeline(vqvae, unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(
        WeightsError, match="is a LDMSuperResolutionPipeline, which has a vqvae: give a pipeline that fills"
    ):
        build(tmp_path)


@pytest.mark.parametrize("change", [
    {"low_res_scheduler": ["diffusers", "DDPMScheduler"]}, {"motion_adapter": ["diffusers", "MotionAdapter"]},
    {"requires_aesthetics_score": True},
    {"image_encoder": ["x", "y"], "text_encoder": [None, None], "tokenizer": [None, None]},
])  # fmt: skip
def test_a_latent_pipeline_with_parts_of_another_task_is_refused(change, theirs, tmp_path):
    index = json.loads((theirs / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(WeightsError, match=f"which has a {next(iter(change))}.*: give a pipeline that fills in holes"):
        pipeline.is_latent(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert pipeline.is_latent(tmp_path)


def test_a_scheduler_that_adds_noise_in_another_way_is_refused(tmp_path):
    for name in ("DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"):
        getattr(diffusers, f"{name}Scheduler")(prediction_type="v_prediction").save_pretrained(tmp_path)
        read = noising.DiscreteNoising(noising.read(tmp_path, noising.DISCRETE))
        expected = getattr(diffusers, f"{name}Scheduler")().alphas_cumprod
        assert read.prediction == "v_prediction" and torch.equal(read._kept(torch.arange(1000)), expected)
    for name in ("EDMEuler", "FlowMatchEulerDiscrete", "ScoreSdeVe", "CogVideoXDDIM"):
        getattr(diffusers, f"{name}Scheduler")().save_pretrained(tmp_path)
        with pytest.raises(WeightsError, match=f"holds a {name}Scheduler, which adds noise in another way"):
            noising.read(tmp_path, noising.DISCRETE)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')  # it says nothing of its betas
    found = noising.DiscreteNoising(noising.read(tmp_path, noising.DISCRETE))._kept(torch.arange(1000))
    assert torch.equal(found, diffusers.LCMScheduler().alphas_cumprod)


def test_a_scheduler_of_the_config_that_leaves_part_of_another_out_is_told(theirs, logged):
    base.tell.cache_clear()
    chosen = {"scheduler": {"prediction_type": "v_prediction"}}
    pipeline.options(theirs, chosen)
    assert "beta_start, beta_end, beta_schedule, which it leaves out, have diffusers' defaults" in logged.text
    logged.clear()
    pipeline.options(theirs, {"scheduler": noising.read(theirs / "scheduler", noising.DISCRETE)})
    assert not logged.text


@pytest.mark.parametrize("config, message", [
    ({"rescale_betas_zero_snr": True}, "epsilon does not go with rescale_betas_zero_snr"),
    ({"trained_betas": [0.1] * 9}, "trained_betas has 9 values for 1000 timesteps"),
    ({"trained_betas": [-0.1] * 1000}, "no schedule"), ({"beta_end": 3.0}, "no schedule"),
    ({"beta_end": float("nan")}, "no schedule"), ({"num_train_timesteps": "1000"}, "'1000' is no whole number"),
])  # fmt: skip
def test_what_is_no_schedule_of_noise_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        noising.DiscreteNoising(config)


def test_samplers_are_certain_and_know_every_schedule():
    config = {"beta_schedule": "sigmoid", "algorithm_type": "sde-dpmsolver++"}
    expected = diffusers.DDPMScheduler(beta_schedule="sigmoid").alphas_cumprod
    for kind in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        sampler = noising.DiscreteNoising(config).sampler(kind, 5, torch.device("cpu"))
        torch.testing.assert_close(sampler.alphas_cumprod, expected)
        assert getattr(sampler.config, "algorithm_type", "dpmsolver++") == "dpmsolver++"


@pytest.mark.parametrize("lost", ["tokenizer/tokenizer_config.json", "text_encoder/config.json"])
def test_a_text_encoder_or_tokenizer_without_its_config_is_told(lost, theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    (folder / lost).unlink()
    with pytest.raises(WeightsError, match=f"lacks {lost}, without which a prompt cannot be embedded"):
        prompts.embedding(folder, {"class": "UNet2DConditionModel"}, {})


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_no_damage_of_a_text_encoder(kind, theirs, tmp_path, monkeypatch):
    def short(*_):
        raise kind("too little memory")

    monkeypatch.setattr(prompts, "_embedded", short)
    with pytest.raises(kind, match="too little memory"):
        build(copied(theirs, tmp_path))


def test_a_damaged_text_encoder_is_told(theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    path, file = folder / "text_encoder" / "config.json", folder / "text_encoder" / "model.safetensors"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"vocab_size": "many"}))
    with pytest.raises(WeightsError, match="its text encoders cannot be used: .*vocab_size"):
        build(folder)
    path.write_text(kept)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="its text encoders cannot be used: Error while deserializing header"):
        build(folder)
    file.unlink()
    torch.save({"a": numpy.float64(3)}, file.with_name("pytorch_model.bin"))
    with pytest.raises(WeightsError, match="its text encoders cannot be used: it holds numpy.*no plain data"):
        build(folder)


def test_a_text_encoder_that_is_missing_is_no_empty_prompt(theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(WeightsError, match="lacks text_encoder, which its model_index.json names.*prompt to null"):
        build(folder)
    assert not build(folder, prompt=None).shared.prompt.any()


def test_a_network_alone_takes_the_rest_from_another_folder(theirs, tmp_path):
    whole = build(theirs)
    folder = copied(theirs, tmp_path)
    (folder / "unet").rename(tmp_path / "unet_ema")
    # What diffusers' training scripts write beside a moving average, and a key of another version.
    path = tmp_path / "unet_ema" / "config.json"
    ema = {
        "decay": 0.9999,
        "inv_gamma": 1.0,
        "optimization_step": 500,
        "power": 0.75,
        "use_ema_warmup": False,
        "new": 1,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | ema))
    assert same(build(tmp_path / "unet_ema", folder), whole)
    with pytest.raises(WeightsError, match="holds a network alone: name the folder of its pipeline, or of its VAE"):
        build(tmp_path / "unet_ema")
    with pytest.raises(WeightsError, match="do not say how noise is added"):
        build(tmp_path / "unet_ema", folder / "vae")
    scheduler = {"beta_schedule": "scaled_linear"}
    with pytest.raises(WeightsError, match="no text_encoder to embed a prompt with.*prompt to null"):
        build(tmp_path / "unet_ema", folder / "vae", scheduler=scheduler)
    parts = build(tmp_path / "unet_ema", folder / "vae", scheduler=scheduler, prompt=None)
    assert torch.equal(parts.first_stage.encoder.conv_in.weight, whole.first_stage.encoder.conv_in.weight)


def test_another_autoencoder_must_scale_latents_alike(theirs, tmp_path):
    shutil.copytree(theirs / "vae", tmp_path / "vae")
    pipeline.options(theirs, {}, tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.13025}))
    with pytest.raises(
        WeightsError, match="has a scaling_factor of 0.13025, the pipeline's own autoencoder one of 0.18"
    ):
        pipeline.options(theirs, {}, tmp_path / "vae")


def test_a_tiny_autoencoder_in_a_pipeline(tmp_path):
    pipeline = made("sd")
    pipeline.vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=[8] * 2, decoder_block_out_channels=[8] * 2, num_encoder_blocks=[1, 1],
        num_decoder_blocks=[1, 1],
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "theirs")
    model = build(tmp_path / "theirs")
    assert torch.equal(model.first_stage.encoder.layers[0].weight, pipeline.vae.encoder.layers[0].weight)
    model.to_folder(tmp_path / "ours")
    assert same(build(tmp_path / "ours"), model)


@torch.no_grad()
def test_training_draws_prompts_and_guidance_samples_away_from_none(theirs):
    texts = ["a cat", "a dog", ""]
    model, alone = build(theirs, prompt=texts[0], prompts=texts[1:]), [build(theirs, prompt=text) for text in texts]
    assert torch.equal(model.shared.prompt, torch.cat([m.shared.prompt for m in alone]))
    sample, t = torch.randn(6, 9, 16, 16), torch.arange(6) * 100
    which = model._texts(600, 3, torch.device("cpu"))
    assert torch.equal(which, model._texts(600, 3, torch.device("cpu"))) and set(which.tolist()) == {0, 1, 2}
    rows = torch.tensor([0, 1, 2, 2, 1, 0])
    mixed = model._predict(sample, t, rows)
    for n, which_one in enumerate(rows.tolist()):
        expected = alone[which_one]._predict(sample[n : n + 1], t[n : n + 1])
        torch.testing.assert_close(mixed[n : n + 1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model._guided(sample, t), model._predict(sample, t))
    model.guide(7.5)
    prompted, plain = alone[0]._predict(sample, t), alone[2]._predict(sample, t)
    torch.testing.assert_close(model._guided(sample, t), plain + 7.5 * (prompted - plain), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="compares with the empty prompt"):
        alone[0].guide(7.5)


@torch.no_grad()
def test_flux_is_told_the_guidance_scale(tmp_path):
    made("flux").save_pretrained(tmp_path)
    model = build(tmp_path)
    t = torch.tensor([300.0])
    before, same_as = model.shared(t, torch.float32)[0], 30.0  # of diffusers' pipeline
    model.guide(same_as)
    assert torch.equal(model.shared(t, torch.float32)[0], before)
    model.guide(7.5)
    assert not torch.equal(model.shared(t, torch.float32)[0], before)


def test_what_the_empty_prompt_of_sdxl_is_is_said(tmp_path, logged):
    made("xl").save_pretrained(tmp_path)
    base.tell.cache_clear()
    prompts._encoded.cache_clear()
    assert not build(tmp_path).shared.prompt.any()
    assert "the empty prompt of this SDXL is zeros" in logged.text


def ldm_network(unet) -> dict[str, torch.Tensor]:
    """The tensors of a UNet of two levels with one block each by the names of Stable Diffusion's own code."""
    places = {
        "conv_in": "input_blocks.0.0", "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1", "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv", "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    layers = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    named = {}
    for name, tensor in unet.state_dict().items():
        place = next(p for p in sorted(places, key=len, reverse=True) if name.startswith(f"{p}."))
        first, _, rest = name.removeprefix(f"{place}.").partition(".")
        first = layers.get(first, first) if "resnets" in place else first
        named[f"model.diffusion_model.{places[place]}.{first}" + (f".{rest}" if rest else "")] = tensor
    return named


def ldm_vae(vae) -> dict[str, torch.Tensor]:
    """The tensors of an autoencoder of two levels by the names of Stable Diffusion's own code."""
    rules = [
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"), (r"up_blocks\.0\.", "up.1."), (r"up_blocks\.1\.", "up.0."),
        (r"(up\.\d)\.resnets", r"\1.block"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"upsamplers\.0", "upsample"), (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"), (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"), (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
    ]  # fmt: skip
    named = {}
    for name, tensor in vae.state_dict().items():
        attention = "attentions" in name and name.endswith("weight") and tensor.dim() == 2
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        named[f"first_stage_model.{name}"] = tensor[..., None, None] if attention else tensor
    return named


def encoder(depth: int, act: str):
    torch.manual_seed(2)
    settings = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=24, num_hidden_layers=depth, num_attention_heads=1,
        hidden_act=act,
        max_position_embeddings=9, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    return transformers.CLIPTextModel(settings).eval()


def ldm_text(model, kind: str) -> dict[str, torch.Tensor]:
    tensors = {n.removeprefix("text_model."): t for n, t in model.state_dict().items()}
    if kind == "sd1":
        return {f"cond_stage_model.transformer.text_model.{n}": t for n, t in tensors.items()}
    named = {}
    for name, tensor in tensors.items():
        for ours, other in (
            ("embeddings.token_embedding.weight", "token_embedding.weight"),
            ("embeddings.position_embedding.weight", "positional_embedding"), ("final_layer_norm", "ln_final"),
            ("encoder.layers", "transformer.resblocks"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn", "attn"),
        ):  # fmt: skip
            name = name.replace(ours, other)
        named[name] = tensor
    for name in [n for n in named if "q_proj" in n]:
        three = [named.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        named[re.sub(r"q_proj\.(\w+)", r"in_proj_\1", name)] = torch.cat(three)
    return {f"cond_stage_model.model.{n}": t for n, t in named.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_single_file_of_stable_diffusions_own_code(kind, tmp_path):
    pipeline = made("sd")
    whole = encoder(3, "gelu") if kind == "sd2" else encoder(2, "quick_gelu")
    tensors = ldm_network(pipeline.unet) | ldm_vae(pipeline.vae)
    # The moving average beside it, and a buffer that is no weight, are left out.
    more = {"model_ema.diffusion_modelout0bias": torch.zeros(8), "betas": torch.zeros(1000)}
    torch.save({"state_dict": tensors | more | ldm_text(whole, kind)}, tmp_path / "inpaint.ckpt")
    options = {"network": {"class": "UNet2DConditionModel", **UNET}, "vae": KL}
    model = build(tmp_path / "inpaint.ckpt", **options)
    expected = {"encoder": pipeline.unet, "first_stage": pipeline.vae}
    found = model.state_dict()
    public = autoencoder.to_public(found)
    assert public.keys() == expected["first_stage"].state_dict().keys()
    assert all(torch.equal(t, public[n]) for n, t in pipeline.vae.state_dict().items())
    kept = {
        n: t for n, t in found.items() if not n.startswith(autoencoder.AUTOENCODER_TENSORS) and n != "shared.prompt"
    }
    unet = pipeline.unet.state_dict()
    assert {n.partition(".")[2] for n in kept} == unet.keys()
    assert all(torch.equal(t, unet[n.partition(".")[2]]) for n, t in kept.items())
    if kind == "sd2":  # its last layer is not used
        used = encoder(2, "gelu")
        used.load_state_dict({n: t for n, t in whole.state_dict().items() if n in used.state_dict()})
        ids = torch.tensor([[52, 53] + [0] * 7])
    else:
        used, ids = whole, torch.tensor([[52] + [53] * 8])
    with torch.no_grad():
        torch.testing.assert_close(found["shared.prompt"], used(ids).last_hidden_state, atol=1e-6, rtol=1e-6)
    with pytest.raises(WeightsError, match="a single file of Stable Diffusion has no tokenizer"):
        build(tmp_path / "inpaint.ckpt", prompt="a cat", **options)
    torch.save(tensors, tmp_path / "pruned.ckpt")
    with pytest.raises(WeightsError, match="has no text encoder to embed even the empty prompt"):
        build(tmp_path / "pruned.ckpt", **options)
    assert not build(tmp_path / "pruned.ckpt", prompt=None, **options).shared.prompt.any()
    # The network alone, behind another prefix, with an autoencoder in a file of its own.
    torch.save({n.removeprefix("model."): t for n, t in ldm_network(pipeline.unet).items()}, tmp_path / "unet.pth")
    torch.save({n.removeprefix("first_stage_model."): t for n, t in ldm_vae(pipeline.vae).items()}, tmp_path / "vae.pt")
    apart = build(tmp_path / "unet.pth", tmp_path / "vae.pt", prompt=None, **options).state_dict()
    assert all(torch.equal(t, apart[n]) for n, t in found.items() if n != "shared.prompt")
    torch.save(tensors | {"model.diffusion_model.input_blocks.9.0.op.weight": torch.zeros(1)}, tmp_path / "more.ckpt")
    with pytest.raises(WeightsError, match="has layers that the network of model.options.network has not"):
        build(tmp_path / "more.ckpt", prompt=None, **options)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 4, 3, 3)
    torch.save(tensors, tmp_path / "text2img.ckpt")
    with pytest.raises(WeightsError, match="one that fills in holes takes 9 channels"):
        build(tmp_path / "text2img.ckpt", **options)


def test_a_single_file_of_sdxls_own_code(tmp_path):
    """Its empty prompt is zeros; what tells it apart is the second text encoder."""
    pipeline = made("xl")
    tensors = ldm_network(pipeline.unet) | ldm_vae(pipeline.vae)
    tensors["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] = torch.zeros(4)
    save_file(tensors, tmp_path / "xl.safetensors")
    options = {"network": {"class": "UNet2DConditionModel", **XL}, "vae": KL}
    model = build(tmp_path / "xl.safetensors", **options)
    save_file({n: t for n, t in tensors.items() if "conditioner" not in n}, tmp_path / "pruned.safetensors")
    assert same(build(tmp_path / "pruned.safetensors", **options), model)
    assert not model.shared.prompt.any() and model.shared.prompt.shape == (1, 77, 32)
    found = unet_condition.to_public(model.state_dict())
    expected = pipeline.unet.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items())


def test_half_precision_stays_half(tmp_path):
    pipeline = made("sd").to(torch.float16)
    pipeline.save_pretrained(tmp_path / "theirs")
    weights.convert(config.Model(family="diffusion", weights=str(tmp_path / "theirs")), str(tmp_path / "ours"))
    for part in ("unet", "vae"):
        found = load_file(tmp_path / "ours" / part / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(t, found[n]) for n, t in getattr(pipeline, part).state_dict().items())
