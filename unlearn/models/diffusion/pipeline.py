"""Pipeline folders of diffusers for latent diffusion that fills in holes: Stable Diffusion 1 and 2, SDXL, FLUX.1-Fill.

The network, the autoencoder and the scheduler are read, and the text encoders' embedding of one prompt. The embedding
is computed once and kept with the model, so the text encoders are never on a device. They are not trained, so they are
not written.
"""

import contextlib
import functools
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unlearn.errors import MissingExtra, WeightsError
from unlearn.models import folders, tensor_files
from unlearn.models.diffusion import autoencoder, flow, networks, noising
from unlearn.models.diffusion.networks import LATENT_NETWORKS, LATENT_UNET, NETWORKS, PROMPT_TENSORS, TRANSFORMER

import diffusers  # isort: skip  after noising, which prepares torchvision

# The parts of a pipeline that turn a prompt into an embedding.
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
# Our own file beside the parts of diffusers: the prompt's embedding, for folders without text encoders.
PROMPT_FILE = "prompt.safetensors"
CLIP_TOKENS = 77  # of a prompt, where a tokenizer does not say it


def read(folder: Path, chosen: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors in our names, options) of a pipeline folder. Raises WeightsError and MissingExtra.

    chosen: the options that the config sets; of these `prompt` counts here.
    """
    values = options(folder)
    kind = values["network"]["class"]
    tensors = networks.module(kind).from_public(folders.tensors(folder / NETWORKS[kind].folder))
    tensors |= autoencoder.first_stage_from(folder / "vae")
    prompt = embedding(folder, values["network"], chosen.get("prompt", ""))
    return tensors | prompt, values | {"tokens": prompt["shared.prompt"].shape[1]}


def options(folder: Path) -> dict[str, Any]:
    """The options of a pipeline folder, from its JSON files and the shape of PROMPT_FILE. Raises WeightsError."""
    home = next((name for name in ("unet", "transformer") if (folder / name).is_dir()), None)
    if home is None:
        raise WeightsError(f"{folder} has neither unet nor transformer: give a whole pipeline folder of diffusers")
    network, vae = networks.described(folder / home), networks.described(folder / "vae")
    kind = network["class"]
    if kind not in LATENT_NETWORKS or NETWORKS[kind].folder != home:
        raise WeightsError(f"{folder / home} holds a {kind}; known in a latent pipeline: {', '.join(LATENT_NETWORKS)}")
    try:
        _, factor = autoencoder.noised_space(vae)
    except ValueError as e:
        raise WeightsError(f"{folder}/vae: {str(e).splitlines()[0]}") from None
    return {
        "network": network,
        "vae": vae,
        "scheduler": folders.public(folders.config(folder / "scheduler" / "scheduler_config.json")),
        "image_size": factor * _side(network),
        "tokens": _tokens(folder, network),
    }


def _side(network: dict[str, Any]) -> int:
    """Latents along a side of the images that the network was trained on."""
    side = network.get("sample_size")
    return side if isinstance(side, int) else 128 if network["class"] == TRANSFORMER else 64


def _tokens(folder: Path, network: dict[str, Any]) -> int:
    """How many tokens the prompt's embedding has."""
    if _has_text_encoders(folder):
        if network["class"] == TRANSFORMER:
            return inspect.signature(diffusers.FluxFillPipeline.encode_prompt).parameters["max_sequence_length"].default
        tokenizer = folder / "tokenizer" / "tokenizer_config.json"
        return folders.config(tokenizer).get("model_max_length", CLIP_TOKENS) if tokenizer.is_file() else CLIP_TOKENS
    if (folder / PROMPT_FILE).is_file():
        try:
            with safe_open(folder / PROMPT_FILE, "pt") as file:
                return file.get_slice("shared.prompt").get_shape()[1]
        except SafetensorError:
            raise WeightsError(f"{folder / PROMPT_FILE} is damaged: write the folder again") from None
    return _no_prompt(network)["shared.prompt"].shape[1]


def _has_text_encoders(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in TEXT if name.startswith("text_encoder"))


def _no_prompt(network: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The embedding that stands for no prompt where nothing else is known: zeros."""
    with torch.device("meta"):
        _, _, shared = networks.module(network["class"]).split(networks.arguments(network))
    named = {f"shared.{name}": tensor for name, tensor in shared.state_dict().items()}
    return {name: torch.zeros(named[name].shape) for name in PROMPT_TENSORS if name in named}


def embedding(folder: Path, network: dict[str, Any], prompt: str) -> dict[str, torch.Tensor]:
    """What the folder's text encoders make of a prompt, (1, T, D) and pooled (1, P): with our names, in float32.

    Without text encoders it is the embedding that was written into the folder, or zeros. Raises WeightsError and
    MissingExtra.
    """
    if not _has_text_encoders(folder):
        if prompt:
            raise WeightsError(f"{folder} has no text_encoder, which model.options.prompt needs: leave the prompt out")
        if (folder / PROMPT_FILE).is_file():
            return tensor_files.load(folder / PROMPT_FILE, str(folder / PROMPT_FILE))
        return _no_prompt(network)
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "text", "a prompt's embedding")
    files = (f for part in TEXT for f in (folder / part).rglob("*"))
    made = _encoded(str(folder), tuple((str(f), f.stat().st_mtime_ns) for f in files), _pipeline_class(network), prompt)
    return {
        name: tensor.clone() for name, tensor in made.items()
    }  # a model takes what it is given, and the teacher needs its own


@functools.lru_cache(maxsize=4)
def _encoded(folder: str, files: tuple, pipeline_class: Any, prompt: str) -> dict[str, torch.Tensor]:
    """Cached for the next model of this process, the teacher. `files`, with times, show whether the folder changed."""
    # None for every part that is not needed here; it would be loaded otherwise.
    wanted = (*TEXT, "force_zeros_for_empty_prompt")
    rest: dict[str, Any] = {name: None for name in inspect.signature(pipeline_class).parameters if name not in wanted}
    plain, half = (list(Path(folder).glob(f"text_encoder*/model{kind}.safetensors*")) for kind in ("", ".fp16"))
    try:
        with torch.no_grad(), _quiet():
            rest |= {"variant": "fp16" if half and not plain else None}
            rest |= {"dtype": torch.float32, "low_cpu_mem_usage": False}
            return _embedded(pipeline_class.from_pretrained(folder, **rest, local_files_only=True), prompt)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise WeightsError(f"{folder}: its text encoders cannot be used: {' '.join(str(e).split())[:300]}") from None


@contextlib.contextmanager
def _quiet():
    """diffusers and transformers without progress bars and notices."""
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


def _embedded(pipeline: Any, prompt: str) -> dict[str, torch.Tensor]:
    """The prompt's embedding by a pipeline of diffusers, with our names."""
    cpu = torch.device("cpu")
    if isinstance(pipeline, diffusers.FluxFillPipeline):
        text, pooled, _ = pipeline.encode_prompt(prompt, None, device=cpu)
    elif isinstance(pipeline, diffusers.StableDiffusionXLInpaintPipeline):
        text, _, pooled, _ = pipeline.encode_prompt(prompt, device=cpu, do_classifier_free_guidance=False)
        # SDXL was trained with zeros where there is no prompt.
        if not prompt and pipeline.config["force_zeros_for_empty_prompt"]:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    else:
        text, _ = pipeline.encode_prompt(prompt, cpu, 1, False)
        return {"shared.prompt": text}
    both: tuple[Any, Any] = (text, pooled)
    return dict(zip(PROMPT_TENSORS, both, strict=True))


def _pipeline_class(network: dict[str, Any]) -> Any:
    """The class of diffusers that fills in holes with this network."""
    if network["class"] == TRANSFORMER:
        return diffusers.FluxFillPipeline
    xl = network.get("addition_embed_type") == "text_time"
    return diffusers.StableDiffusionXLInpaintPipeline if xl else diffusers.StableDiffusionInpaintPipeline


def write(tensors: dict[str, torch.Tensor], options, folder: Path) -> None:
    """Write a pipeline folder that diffusers' own class loads. It has no text encoders; diffusers takes those of
    another folder:

    Pipeline.from_pretrained(folder, text_encoder=..., tokenizer=...). tensors: the model's. Raises WeightsError.
    """
    network, vae = options.network, options.vae
    if vae["class"] == "TAEF2":
        raise WeightsError("diffusers has no class for the autoencoder TAEF2: there is no such folder of this model")
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "text", "a pipeline folder of diffusers")
    kind = network["class"]
    home = NETWORKS[kind].folder
    # diffusers' pipelines for UNets look at the size that the UNet was made for.
    size = {"sample_size": options.image_size // autoencoder.noised_space(vae)[1]} if kind == LATENT_UNET else {}
    parts = {home: getattr(diffusers, kind)(**{**size, **networks.arguments(network)}), "vae": autoencoder.whole(vae)}
    parts[home].load_state_dict(networks.module(kind).to_public(tensors), assign=True)
    parts["vae"].load_state_dict(autoencoder.to_public(tensors), assign=True)
    scheduler = flow.SCHEDULER if kind == TRANSFORMER else "DDIMScheduler"
    parts["scheduler"] = noising.scheduler(scheduler, options.scheduler)
    cls = _pipeline_class(network)
    wanted = inspect.signature(cls).parameters
    if "safety_checker" in wanted:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    text = {name: None for name in TEXT if name in wanted}
    with _quiet():
        cls(**parts, **text).save_pretrained(folder)
    tensor_files.save({n: tensors[n] for n in PROMPT_TENSORS if n in tensors}, folder / PROMPT_FILE)
