"""Single files of Stable Diffusion's own code (SD-1.5, SD-2 and SDXL inpainting): network, VAE and text encoder in one.

diffusers' own functions rename the tensors. Such a file has no tokenizer, so of all prompts only the empty one can be
embedded, whose tokens are known.
"""

import importlib.util
from typing import Any

import torch

from unlearn.errors import MissingExtra, WeightsError
from unlearn.models import base, file_formats
from unlearn.models.diffusion import autoencoder, prompts, unet_condition
from unlearn.models.diffusion.shapes import VARIANTS

import diffusers.loaders.single_file_utils as theirs  # isort: skip  after autoencoder, which prepares torchvision

NETWORK = "model.diffusion_model."
VARIANT = {"inpainting": "sd1_inpaint_512", "inpainting_v2": "sd2_inpaint_512", "xl_inpaint": "sdxl_inpaint_1024"}
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
HEAD_WIDTH = 64  # channels of an attention head of both text encoders


def is_ldm(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether these are the tensors of such a file, or of its network alone."""
    return any(name.startswith(f"{NETWORK}input_blocks.") for name in tensors) or _is_network(tensors)


def _is_network(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether these are the tensors of the network alone, without its prefix: with layers that attend to a text."""
    return {"input_blocks.0.0.weight", "time_embed.0.weight"} <= tensors.keys() and any(".attn2." in n for n in tensors)


def read(tensors: dict[str, torch.Tensor], chosen: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors in our names, options). Raises WeightsError and MissingExtra.

    chosen: the options that the config sets: `network` and `vae`, where they are not those of the released models.
    """
    if _is_network(tensors):
        tensors = {f"{NETWORK}{name}": tensor for name, tensor in tensors.items()}
    kind = theirs.infer_diffusers_model_type(tensors)
    if kind == "inpainting" and f"{NETWORK}label_emb.0.0.weight" in tensors:
        kind = "xl_inpaint"  # which is otherwise known by a text encoder that may have been left out
    if any(name.startswith("control_model.") for name in tensors):
        kind = "controlnet"
    if kind not in VARIANT:
        raise WeightsError(
            f"a file of Stable Diffusion of the kind {kind}: one that fills in holes takes 9 channels; known: "
            f"{', '.join(VARIANT)}"
        )
    options = {**VARIANTS[VARIANT[kind]], **{name: chosen[name] for name in ("network", "vae") if name in chosen}}
    network, vae = options["network"], options["vae"]
    try:
        converted = theirs.convert_ldm_unet_checkpoint(tensors, _complete(network))
        found = unet_condition.from_public(converted)
        if any(name.startswith(tuple(theirs.LDM_VAE_KEYS)) for name in tensors):
            found |= autoencoder.from_public(theirs.convert_ldm_vae_checkpoint(tensors, vae))
    except (KeyError, AttributeError, IndexError) as e:
        raise WeightsError(f"this file of Stable Diffusion lacks a part of its network: {e}") from None
    if len(converted) < sum(name.startswith(NETWORK) for name in tensors):
        raise WeightsError(
            "this file of Stable Diffusion has layers that the network of model.options.network has not: it is of "
            "another shape, or of another kind"
        )
    text = _text(tensors, kind, chosen, network)
    return found | text, options | {"tokens": text["shared.prompt"].shape[1]}


def _complete(network: dict[str, Any]) -> dict[str, Any]:
    """A network's config with the defaults that diffusers' function looks at."""
    return {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None, **network}


def _text(
    tensors: dict[str, torch.Tensor], kind: str, chosen: dict[str, Any], network: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The embedding of the empty prompt, (1, T, D)."""
    if chosen.get("prompt") or chosen.get("prompts"):
        raise WeightsError(
            "a single file of Stable Diffusion has no tokenizer, which model.options.prompt needs: leave it out, or "
            "give the folder of the pipeline"
        )
    if chosen.get("prompt", "") is None:
        return prompts.none(network)
    if kind == "xl_inpaint":
        base.tell(prompts.SDXL_EMPTY)
        return prompts.none(network)
    if not any(name.startswith((CLIP, OPEN_CLIP)) for name in tensors):
        raise WeightsError(
            "this file has no text encoder to embed even the empty prompt: set model.options.prompt to null for zeros "
            "in its place"
        )
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "text", "a prompt's embedding")
    return {"shared.prompt": _empty_prompt(tensors)}


@torch.no_grad()
def _empty_prompt(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1, T, D) by SD-1's text encoder, or SD-2's, of which all layers but the last are used. Raises WeightsError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPTextConfig, CLIPTextModel

    open_clip = not any(name.startswith(CLIP) for name in tensors)
    layers, words, places, inner = (
        ("transformer.resblocks.", "token_embedding.weight", "positional_embedding", "0.mlp.c_fc.bias")
        if open_clip
        else ("encoder.layers.", "embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
            "0.mlp.fc1.bias")
    )  # fmt: skip
    prefix = OPEN_CLIP if open_clip else CLIP
    try:
        (vocabulary, width), (count, _) = tensors[prefix + words].shape, tensors[prefix + places].shape
        inside = len(tensors[prefix + layers + inner])
    except KeyError as e:
        raise WeightsError(f"this file of Stable Diffusion lacks a part of its text encoder: {e}") from None
    depth = len({n.removeprefix(prefix + layers).split(".")[0] for n in tensors if n.startswith(prefix + layers)})
    try:
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=inside,
                num_hidden_layers=depth - open_clip, num_attention_heads=max(1, width // HEAD_WIDTH),
                max_position_embeddings=count, hidden_act="gelu" if open_clip else "quick_gelu",
                bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
            )
        ).eval()  # fmt: skip
    except (ValueError, TypeError, StrictDataclassError) as e:
        raise WeightsError(f"this file's text encoder is of no shape that is known: {file_formats.why(e)}") from None
    if open_clip:
        found = theirs.convert_open_clip_checkpoint(model, tensors, OPEN_CLIP)
    else:
        found = theirs.convert_ldm_clip_checkpoint(tensors)
    # Versions of transformers differ in whether the whole stands behind this word.
    found = {name.removeprefix("text_model."): tensor.float() for name, tensor in found.items()}
    own = {name: name.removeprefix("text_model.") for name in model.state_dict()}
    if missing := [name for name in own.values() if name not in found]:
        raise WeightsError(f"this file of Stable Diffusion lacks a part of its text encoder: {missing[0]}")
    model.load_state_dict({name: found[public] for name, public in own.items()})
    # Start, end, then what the tokenizer fills up with: the end again in SD-1, token 0 in SD-2.
    ids = torch.full((1, count), 0 if open_clip else vocabulary - 1)
    ids[0, :2] = torch.tensor([vocabulary - 2, vocabulary - 1])
    return model(ids).last_hidden_state
