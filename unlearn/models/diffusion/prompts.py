"""The embedding of prompts by the text encoders of a pipeline of diffusers.

It is computed once and kept with the model, so the text encoders are never on a device. They are not trained.
"""

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unlearn.errors import ConfigError, MissingExtra, WeightsError
from unlearn.models import base, file_formats, folders, tensor_files
from unlearn.models.diffusion import networks
from unlearn.models.diffusion.networks import PROMPT_TENSORS, TRANSFORMER

import diffusers  # isort: skip  after networks, which prepares torchvision

# The parts of a pipeline that turn a prompt into an embedding.
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
# Our own file beside the parts of diffusers: the first prompt's embedding, for folders without text encoders.
FILE = "prompt.safetensors"
SDXL_EMPTY = (
    "the empty prompt of this SDXL is zeros (force_zeros_for_empty_prompt), not the text encoders' embedding of ''"
)
CLIP_TOKENS = 77  # of a prompt, where a tokenizer does not say it


def embedding(folder: Path, network: dict[str, Any], chosen: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the folder's text encoders make of the prompts, (K, T, D) and pooled (K, P): with our names, in float32.

    chosen: the options that the config sets: the first row is of `prompt`, the others of `prompts`. Where `prompt` is
    null it is zeros. Without text encoders it is the embedding that was written into the folder. Raises WeightsError,
    ConfigError and MissingExtra.
    """
    prompt, others = chosen.get("prompt", ""), tuple(chosen.get("prompts", ()))
    if prompt is None:
        return none(network)
    if not all(isinstance(text, str) for text in (prompt, *others)):
        raise ConfigError("model.options.prompt and prompts are texts: put them in quotes")
    if missing := [name for name in _promised(folder) if not (folder / name).is_dir()]:
        raise WeightsError(
            f"{folder} lacks {', '.join(missing)}, which its model_index.json names: give the whole folder, or set "
            "model.options.prompt to null for zeros in place of a prompt's embedding"
        )
    if not has_encoders(folder):
        if prompt or others:
            raise WeightsError(f"{folder} has no text_encoder, which model.options.prompt needs: leave the prompt out")
        if (folder / FILE).is_file():
            return tensor_files.load(folder / FILE, str(folder / FILE))
        raise WeightsError(
            f"{folder} has no text_encoder to embed a prompt with, not even the empty one: give a whole pipeline's "
            "folder, or set model.options.prompt to null for zeros in its place"
        )
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "text", "a prompt's embedding")
    _check_complete(folder, pipeline_class(network))
    files = (f for part in TEXT for f in (folder / part).rglob("*"))
    changed = tuple((str(f), f.stat().st_mtime_ns) for f in files)
    made = _encoded(str(folder), changed, pipeline_class(network), (prompt, *others))
    # A model takes what it is given, and the teacher needs its own.
    return {name: tensor.clone() for name, tensor in made.items()}


def tokens(folder: Path, network: dict[str, Any]) -> int:
    """How many tokens the prompt's embedding has. Raises WeightsError."""
    if has_encoders(folder):
        if network["class"] == TRANSFORMER:
            return inspect.signature(diffusers.FluxFillPipeline.encode_prompt).parameters["max_sequence_length"].default
        tokenizer = folder / "tokenizer" / "tokenizer_config.json"
        return folders.config(tokenizer).get("model_max_length", CLIP_TOKENS) if tokenizer.is_file() else CLIP_TOKENS
    if (folder / FILE).is_file():
        try:
            with safe_open(folder / FILE, "pt") as file:
                return file.get_slice("shared.prompt").get_shape()[1]
        except SafetensorError:
            raise WeightsError(f"{folder / FILE} is damaged: write the folder again") from None
    return none(network)["shared.prompt"].shape[1]


def has_encoders(folder: Path) -> bool:
    """Whether a folder holds text encoders."""
    return any((folder / name).is_dir() for name in TEXT if name.startswith("text_encoder"))


def none(network: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Zeros in the shape of a prompt's embedding."""
    with torch.device("meta"):
        _, _, shared = networks.module(network["class"]).split(networks.arguments(network))
    named = {f"shared.{name}": tensor for name, tensor in shared.state_dict().items()}
    return {name: torch.zeros(named[name].shape) for name in PROMPT_TENSORS if name in named}


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write FILE. tensors: the model's."""
    tensor_files.save({n: tensors[n][:1] for n in PROMPT_TENSORS if n in tensors}, folder / FILE)


def pipeline_class(network: dict[str, Any]) -> Any:
    """The class of diffusers that fills in holes with this network."""
    if network["class"] == TRANSFORMER:
        return diffusers.FluxFillPipeline
    xl = network.get("addition_embed_type") == "text_time"
    return diffusers.StableDiffusionXLInpaintPipeline if xl else diffusers.StableDiffusionInpaintPipeline


def parts() -> set[str]:
    """The parts that the pipelines of diffusers which fill in holes may have."""
    xl = diffusers.StableDiffusionXLInpaintPipeline
    pipelines = (diffusers.StableDiffusionInpaintPipeline, xl, diffusers.FluxFillPipeline)
    return {name for cls in pipelines for name in inspect.signature(cls).parameters}


def _check_complete(folder: Path, kind: Any) -> None:
    """Raise WeightsError where a text encoder or its tokenizer is not there, or without its config."""
    wanted = [name for name in TEXT if name in inspect.signature(kind).parameters]
    there = [name for name in wanted if (folder / name).is_dir()]
    if kind is diffusers.StableDiffusionXLInpaintPipeline and there == ["text_encoder_2", "tokenizer_2"]:
        wanted = there  # as SDXL's refiner has it
    lost = [name for name in wanted if name not in there]
    files = {"text_encoder": "config.json", "tokenizer": "tokenizer_config.json"}
    lost += [
        f"{name}/{file}" for name in there
        if not (folder / name / (file := files[name.removesuffix("_2")])).is_file()
    ]  # fmt: skip
    if lost:
        raise WeightsError(
            f"{folder} lacks {', '.join(lost)}, without which a prompt cannot be embedded: give the whole folder, or "
            "set model.options.prompt to null for zeros in its place"
        )


def _promised(folder: Path) -> list[str]:
    """The parts that turn a prompt into an embedding, as far as model_index.json names them."""
    index = folders.config(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    return [name for name in TEXT if isinstance(index.get(name), list) and index[name][0]]


@functools.lru_cache(maxsize=4)
def _encoded(folder: str, files: tuple, kind: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Cached for the next model of this process, the teacher. `files`, with times, show whether the folder changed."""
    # None for every part that is not needed here; it would be loaded otherwise.
    wanted = (*TEXT, "force_zeros_for_empty_prompt")
    rest: dict[str, Any] = {name: None for name in inspect.signature(kind).parameters if name not in wanted}
    variant = _variant(Path(folder))
    try:
        with torch.no_grad(), quiet():
            rest |= {"variant": variant, "dtype": torch.float32, "low_cpu_mem_usage": False}
            pipeline = kind.from_pretrained(folder, **rest, local_files_only=True)
            rows = [_embedded(pipeline, prompt) for prompt in prompts]
    except (MemoryError, torch.OutOfMemoryError):  # says nothing of the files
        raise
    except Exception as e:  # transformers reads foreign files, and raises whatever it meets
        raise WeightsError(f"{folder}: its text encoders cannot be used: {file_formats.why(e)}") from None
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _variant(folder: Path) -> str | None:
    """The variant (fp16) of a text encoder's weights that has no others."""
    for encoder in sorted(folder.glob("text_encoder*")):
        names = [path.name for path in encoder.glob("*") if path.name.startswith(("model.", "pytorch_model."))]
        plain = {
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        }
        variants = [name.split(".")[1] for name in names if name.count(".") == 2 and "-of-" not in name]
        if variants and not plain & set(names):
            return "fp16" if "fp16" in variants else variants[0]
    return None


@contextlib.contextmanager
def quiet():
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
            base.tell(SDXL_EMPTY)
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    else:
        text, _ = pipeline.encode_prompt(prompt, cpu, 1, False)
        return {"shared.prompt": text}
    both: tuple[Any, Any] = (text, pooled)
    return dict(zip(PROMPT_TENSORS, both, strict=True))
