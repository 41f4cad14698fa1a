"""Pipeline folders of diffusers for latent diffusion that fills in holes: Stable Diffusion 1 and 2, SDXL, FLUX.1-Fill.

Read are network, autoencoder, scheduler, and what the text encoders make of one prompt: that is computed once and kept with the
model, so the text encoders themselves are never on a device. None of them is trained, so none is written.
"""

import contextlib
import functools
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from unlearn.errors import MissingExtra, WeightsError
from unlearn.models import folders, tensor_files
from unlearn.models.diffusion import autoencoder, flow, flux, unet_condition

import diffusers  # isort: skip  after flow, which makes torchvision fit

# diffusers' class of the network -> its folder in a pipeline, the file that splits it
NETWORKS = {"UNet2DConditionModel": ("unet", unet_condition), "FluxTransformer2DModel": ("transformer", flux)}
# The parts of a pipeline that turn a prompt into numbers.
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
# Ours, beside the parts of diffusers: the prompt's embedding, so that a folder without text encoders keeps it.
PROMPT = "prompt.safetensors"


def read(folder: Path, chosen: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors in our names, options) of a pipeline folder; chosen: options of the config, of which `prompt` counts here.

    Raises WeightsError.
    """
    home, found = options(folder)
    file = NETWORKS[found["network"]["class"]][1]
    prompt = embedding(folder, found["network"], chosen.get("prompt", ""))
    held = file.from_public(folders.tensors(folder / home)) | autoencoder.first_stage_from(folder / "vae")
    return held | prompt, found | {"tokens": prompt["shared.prompt"].shape[1]}


def options(folder: Path) -> tuple[str, dict[str, Any]]:
    """(the network's folder in it, options) of a pipeline folder, in which files of tensors may be missing. Raises WeightsError."""
    home, file = next((found for kind in NETWORKS if (folder / (found := NETWORKS[kind])[0]).is_dir()), (None, None))
    if home is None:
        raise WeightsError(f"{folder} has neither unet nor transformer: give a whole pipeline folder of diffusers")
    network, vae = _described(folder / home), _described(folder / "vae")
    if NETWORKS.get(network["class"], (None,))[0] != home:
        raise WeightsError(f"{folder / home} holds a {network['class']}; known in a latent pipeline: {', '.join(NETWORKS)}")
    try:
        channels, factor = autoencoder.shape(vae)
    except (ValueError, TypeError) as e:
        raise WeightsError(f"{folder}/vae: {str(e).splitlines()[0]}") from None
    return home, {
        "network": network, "vae": vae, "scheduler": folders.public(folders.config(folder / "scheduler" / "scheduler_config.json")),
        "image_size": factor * _side(network), "tokens": _tokens(folder, file),
    }  # fmt: skip


def _described(folder: Path) -> dict[str, Any]:
    config = folders.config(folder / "config.json")
    return {"class": config.get("_class_name"), **folders.public(config)}


def _side(network: dict[str, Any]) -> int:
    """Latents along an image's side, of the images it was trained on."""
    side = network.get("sample_size")
    return side if isinstance(side, int) else 128 if network["class"] == "FluxTransformer2DModel" else 64


def _tokens(folder: Path, file: ModuleType) -> int:
    """Tokens of a prompt, as the folder's tokenizer is used by diffusers, or as they are where nothing is said."""
    if (folder / PROMPT).is_file():
        return tensor_files.load(folder / PROMPT, str(folder / PROMPT))["shared.prompt"].shape[1]
    said = folder / "tokenizer" / "tokenizer_config.json"
    length = folders.config(said).get("model_max_length") if file is unet_condition and said.is_file() else None
    return length or inspect.signature(file.split).parameters["tokens"].default


def embedding(folder: Path, network: dict[str, Any], prompt: str) -> dict[str, torch.Tensor]:
    """What the folder's text encoders make of a prompt, (1, T, D) and pooled (1, P): by our names, in float32.

    A folder without text encoders gives what was written with it, or zeros. Raises WeightsError and MissingExtra.
    """
    if not (folder / "text_encoder").is_dir() and not (folder / "text_encoder_2").is_dir():
        if prompt:
            raise WeightsError(f"{folder} has no text_encoder, which model.options.prompt needs: leave the prompt out")
        if (folder / PROMPT).is_file():
            return tensor_files.load(folder / PROMPT, str(folder / PROMPT))
        with torch.device("meta"):
            _, _, shared = NETWORKS[network["class"]][1].split(_arguments(network))
        return {f"shared.{n}": torch.zeros(t.shape) for n, t in shared.state_dict().items() if f"shared.{n}" in flux.PROMPT}
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "text", "a prompt's embedding")
    files = (f for part in TEXT for f in (folder / part).rglob("*"))
    made = _encoded(str(folder), tuple((str(f), f.stat().st_mtime_ns) for f in files), _pipeline(network), prompt)
    return {n: t.clone() for n, t in made.items()}  # a model takes what it is given, and the teacher needs its own


@functools.lru_cache(maxsize=4)
def _encoded(folder: str, files: tuple, pipeline: type, prompt: str) -> dict[str, torch.Tensor]:
    """Kept for the next model of this process, the teacher; `files` with their times tell whether the folder is the same."""
    # None stands for what is not needed here and would be loaded.
    rest = {name: None for name in inspect.signature(pipeline).parameters if name not in (*TEXT, "force_zeros_for_empty_prompt")}
    plain, half = (list(Path(folder).glob(f"text_encoder*/model{kind}*")) for kind in (".safetensors", ".fp16.safetensors"))
    try:
        with torch.no_grad(), _quiet():
            rest |= {"variant": "fp16" if half and not plain else None, "dtype": torch.float32, "low_cpu_mem_usage": False}
            made = pipeline.from_pretrained(folder, **rest, local_files_only=True)
            return _embedded(made, prompt)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise WeightsError(f"{folder}: its text encoders cannot be used: {' '.join(str(e).split())[:300]}") from None


@contextlib.contextmanager
def _quiet():
    """diffusers and transformers without progress bars and notes."""
    from transformers.utils import logging

    logs = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers.utils.logging, logging)]
    try:
        for log, _, _ in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield
    finally:
        for log, verbosity, bars in logs:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def _embedded(pipeline, prompt: str) -> dict[str, torch.Tensor]:
    if isinstance(pipeline, diffusers.FluxFillPipeline):
        text, pooled, _ = pipeline.encode_prompt(prompt, None, device="cpu")
    elif isinstance(pipeline, diffusers.StableDiffusionXLInpaintPipeline):
        text, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        # SDXL learnt what no prompt is from zeros.
        if not prompt and pipeline.config.force_zeros_for_empty_prompt:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    else:
        text, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        return {"shared.prompt": text}
    return {"shared.prompt": text, "shared.pooled": pooled}


def _pipeline(network: dict[str, Any]) -> type:
    """The class of diffusers that fills in holes with this network."""
    if network["class"] == "FluxTransformer2DModel":
        return diffusers.FluxFillPipeline
    xl = network.get("addition_embed_type") == "text_time"
    return diffusers.StableDiffusionXLInpaintPipeline if xl else diffusers.StableDiffusionInpaintPipeline


def write(tensors: dict[str, torch.Tensor], options, folder: Path) -> None:
    """Write a pipeline folder that diffusers' own class loads, without text encoders; with them from the original folder:

    Pipeline.from_pretrained(folder, text_encoder=..., tokenizer=...). tensors: the model's. Raises WeightsError.
    """
    network, vae = options.network, options.vae
    if vae["class"] == "TAEF2":
        raise WeightsError("diffusers has no class for the autoencoder TAEF2: there is no such folder of this model")
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "text", "a pipeline folder of diffusers")
    home, file = NETWORKS[network["class"]]
    # diffusers' pipelines look at the size of UNets that are made for one
    size = {"sample_size": options.image_size // autoencoder.shape(vae)[1]} if file is unet_condition else {}
    parts = {home: getattr(diffusers, network["class"])(**{**size, **_arguments(network)}), "vae": autoencoder.whole(vae)}
    parts[home].load_state_dict(file.to_public(tensors), assign=True)
    parts["vae"].load_state_dict(autoencoder.to_public(tensors), assign=True)
    kind = flow.SCHEDULER if file is flux else "DDIMScheduler"
    parts["scheduler"] = getattr(diffusers, kind).from_config(options.scheduler)
    cls = _pipeline(network)
    if cls is diffusers.StableDiffusionInpaintPipeline:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    text = {name: None for name in TEXT if name in inspect.signature(cls).parameters}
    with _quiet():
        cls(**parts, **text).save_pretrained(folder)
    tensor_files.save({n: tensors[n] for n in flux.PROMPT if n in tensors}, folder / PROMPT)


def _arguments(described: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name != "class"}
