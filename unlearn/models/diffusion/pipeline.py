"""Pipelines of diffusers for latent diffusion that fills in holes: Stable Diffusion 1 and 2, SDXL, FLUX.1-Fill.

Read are the network, the autoencoder, the scheduler and the embedding of prompts: from a pipeline's folder, or the
network from a folder of its own (unet, unet_ema) and the rest from another one.
"""

import importlib.util
import inspect
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unlearn.errors import MissingExtra, WeightsError
from unlearn.models import base, folders
from unlearn.models.diffusion import autoencoder, flow, networks, noising, prompts
from unlearn.models.diffusion.networks import LATENT_NETWORKS, LATENT_UNET, NETWORKS, TRANSFORMER

import diffusers  # isort: skip  after noising, which prepares torchvision

INDEX = "model_index.json"
# Parts of a pipeline that works on pixels.
_PIXEL_PARTS = ("unet", "scheduler")


@dataclass(frozen=True)
class Parts:
    """Folders of the parts of a pipeline. scheduler: None where nothing says how noise is added."""

    network: Path
    vae: Path | None
    scheduler: Path | None
    text: Path


def parts(folder: Path, first_stage: Path | None = None) -> Parts:
    """Where the parts are: in a pipeline's folder, or the network alone, the others in `first_stage`. Raises
    WeightsError."""
    if not (folder / INDEX).is_file() and (folder / "config.json").is_file():
        if first_stage is None:
            raise WeightsError(
                f"{folder} holds a network alone: name the folder of its pipeline, or of its VAE, in model.first_stage"
            )
        if not (first_stage / INDEX).is_file():
            return Parts(folder, first_stage if (first_stage / "config.json").is_file() else None, None, first_stage)
        return Parts(folder, first_stage / "vae", first_stage / "scheduler", first_stage)
    home = next((name for name in ("unet", "transformer") if (folder / name).is_dir()), None)
    if home is None:
        raise WeightsError(f"{folder} has neither unet nor transformer: give a whole pipeline folder of diffusers")
    return Parts(folder / home, folder / "vae", folder / "scheduler", folder)


def is_latent(folder: Path) -> bool:
    """Whether a folder is of a pipeline, or a network, that works on latents. Raises WeightsError for other
    pipelines."""
    if not (folder / INDEX).is_file():
        return networks.described(folder)["class"] in LATENT_NETWORKS
    index = folders.config(folder / INDEX)
    held = {name for name, value in index.items() if isinstance(value, list) and value and value[0]}
    known = set(prompts.parts() if "vae" in held else _PIXEL_PARTS)
    if not held & set(prompts.TEXT):  # with an image encoder alone it is told by a picture what to paint
        known.discard("image_encoder")
    strange = sorted(held - known)
    if index.get("requires_aesthetics_score"):
        strange.append("requires_aesthetics_score, a network that is told how beautiful its image is")
    if strange:
        raise WeightsError(
            f"{folder} is a {index.get('_class_name', 'pipeline')}, which has a {strange[0]}: give a pipeline that "
            "fills in holes"
        )
    return "vae" in index


def read(
    folder: Path, chosen: dict[str, Any], first_stage: Path | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors in our names, options) of a pipeline. Raises WeightsError and MissingExtra.

    chosen: the options that the config sets; of these the prompts count here.
    """
    values, found = options(folder, chosen, first_stage), parts(folder, first_stage)
    network = values["network"]
    tensors = networks.module(network["class"]).from_public(folders.tensors(found.network))
    if first_stage is None:
        tensors |= autoencoder.first_stage_from(folder / "vae")
    prompt = prompts.embedding(found.text, network, chosen)
    return tensors | prompt, values | {"tokens": prompt["shared.prompt"].shape[1]}


def options(folder: Path, chosen: dict[str, Any], first_stage: Path | None = None) -> dict[str, Any]:
    """The options of a pipeline, from its JSON files and the shape of its prompt's embedding. Raises WeightsError."""
    found = parts(folder, first_stage)
    network = networks.described(found.network)
    kind = network["class"]
    if kind not in LATENT_NETWORKS or (found.network.parent == folder and NETWORKS[kind].folder != found.network.name):
        raise WeightsError(f"{found.network} holds a {kind}; known in a latent pipeline: {', '.join(LATENT_NETWORKS)}")
    vae = networks.described(found.vae) if found.vae else chosen.get("vae")
    if vae is None:
        raise WeightsError(f"{first_stage} does not describe its autoencoder: give model.options.vae")
    if first_stage is not None and found.vae == folder / "vae":
        _check_scaling(vae, first_stage)
    try:
        _, factor = autoencoder.noised_space(vae)
    except ValueError as e:
        raise WeightsError(f"{found.vae}: {str(e).splitlines()[0]}") from None
    if found.scheduler is not None:
        scheduler = noising.read(found.scheduler, noising.FLOW if kind == TRANSFORMER else noising.DISCRETE)
        noising.tell_replaced(scheduler, chosen, str(folder))
        if scheduler.get("clip_sample"):
            base.tell(
                f"{found.scheduler} says clip_sample, which cuts latents off at -1 and 1: sampling here does not "
                "follow it, and `convert` writes it as it is"
            )
    elif "scheduler" in chosen:
        scheduler = chosen["scheduler"]
    else:
        raise WeightsError(
            f"{folder} and {first_stage} do not say how noise is added: give the folder of a pipeline as "
            "model.first_stage, or model.options.scheduler"
        )
    side = _side(network)
    if side is None and "image_size" not in chosen:
        raise WeightsError(f"{found.network} was made for images that are no squares: give model.options.image_size")
    return {
        "network": network,
        "vae": vae,
        "scheduler": scheduler,
        "image_size": factor * side if side else chosen["image_size"],
        "tokens": prompts.tokens(found.text, network),
    }


def _check_scaling(vae: dict[str, Any], first_stage: Path) -> None:
    """Raise WeightsError where another autoencoder scales latents in another way than the pipeline's own does."""
    home = first_stage / "vae" if (first_stage / INDEX).is_file() else first_stage
    if not (home / "config.json").is_file():
        return
    other = networks.described(home)
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if name in other and name in vae and other[name] != vae[name]:
            raise WeightsError(
                f"{first_stage} has a {name} of {other[name]}, the pipeline's own autoencoder one of {vae[name]}: its "
                "latents are others than the network was trained on"
            )


def _side(network: dict[str, Any]) -> int | None:
    """Latents along a side of the images that the network was trained on; None where these are no squares."""
    side = network.get("sample_size")
    if isinstance(side, list) and len(side) == 2:
        return side[0] if side[0] == side[1] else None
    return side if isinstance(side, int) else 128 if network["class"] == TRANSFORMER else 64


def write(tensors: dict[str, torch.Tensor], options, folder: Path, origin: Path | None = None) -> str:
    """Write a pipeline folder that diffusers' own class loads; the expression that does, with FOLDER for its place.

    tensors: the model's. origin: a pipeline's folder whose text encoders are copied, since they were not trained;
    without it the folder holds the prompt's embedding alone. Raises WeightsError and MissingExtra.
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
    made = {home: getattr(diffusers, kind)(**{**size, **networks.arguments(network)}), "vae": autoencoder.whole(vae)}
    made[home].load_state_dict(networks.module(kind).to_public(tensors), assign=True)
    made["vae"].load_state_dict(autoencoder.to_public(tensors), assign=True)
    if kind == TRANSFORMER:
        made["scheduler"] = noising.scheduler(flow.SCHEDULER, options.scheduler)
    else:  # one that does not name the key does not clip; diffusers' DDIM would clip latents to -1 .. 1
        named = {"clip_sample": False, **noising.spelled_out(options.scheduler)}
        made["scheduler"] = noising.scheduler("DDIMScheduler", named)
    cls = prompts.pipeline_class(network)
    wanted = inspect.signature(cls).parameters
    if "safety_checker" in wanted:
        made |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    text = [name for name in prompts.TEXT if name in wanted]
    with prompts.quiet():
        cls(**made, **dict.fromkeys(text)).save_pretrained(folder)
    prompts.save(tensors, folder)
    copied = _copy_text(text, origin, folder)
    without = "" if copied else "".join(f", {name}=None" for name in text)
    return f"diffusers.{cls.__name__}.from_pretrained(FOLDER{without})"


def _copy_text(names: list[str], origin: Path | None, folder: Path) -> bool:
    """Copy the text encoders and tokenizers of one pipeline's folder into another; whether they were all there."""
    if origin is None or not all((origin / name).is_dir() for name in names):
        return False
    theirs, ours = folders.config(origin / INDEX), folders.config(folder / INDEX)
    for name in names:
        shutil.copytree(origin / name, folder / name)
        ours[name] = theirs[name]
    (folder / INDEX).write_text(json.dumps(ours, indent=2))
    return True
