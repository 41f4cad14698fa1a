"""Masked autoencoders as transformers' ViTMAEForPreTraining saves them: config.json and model.safetensors."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from unlearn.errors import WeightsError
from unlearn.models import folders, tensor_files

# Their name of a part of a block -> ours: those in released files, then those of transformers 5 in memory.
_BLOCK = {
    "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1", "layernorm_after": "norm2",
}  # fmt: skip
# Their names of q, k and v -> the place in the one tensor that holds all three here.
_QKV = {"attention.attention.query": 0, "attention.attention.key": 1, "attention.attention.value": 2,
        "attention.q_proj": 0, "attention.k_proj": 1, "attention.v_proj": 2}  # fmt: skip
_REST = {
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
    "vit.layernorm": "encoder.norm",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.decoder_pos_embed": "decoder.pos_embed",
    "decoder.decoder_embed": "decoder.embed",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_pred": "decoder.pred",
}
_LAYER = re.compile(
    r"(vit|decoder)\.(?:encoder\.layer|layers|decoder_layers|decoder_encoder\.layer)\.(\d+)\.(.+)\.(weight|bias)"
)
_OPTIONS = {
    "image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size", "depth": "num_hidden_layers",
    "heads": "num_attention_heads", "decoder_width": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers", "decoder_heads": "decoder_num_attention_heads",
    "norm_eps": "layer_norm_eps",
}  # fmt: skip


def options(folder: Path) -> dict[str, Any]:
    """The options of a MaskedAutoencoder that the folder's JSON files describe. Raises WeightsError."""
    settings = _json(folder / "config.json")
    if settings.get("model_type") != "vit_mae":
        raise WeightsError(f"{folder}: config.json is of a {settings.get('model_type')!r}, not of a ViTMAE")
    other = settings.get("num_channels", 3) != 3 or settings.get("hidden_act", "gelu") != "gelu"
    if settings.get("qkv_bias") is False or other:
        raise WeightsError(
            f"{folder}: a ViTMAE without qkv_bias, with other than 3 channels or without GELU is not supported"
        )
    try:
        values = {ours: _side(settings[theirs]) for ours, theirs in _OPTIONS.items()}
        values["norm_pix_loss"] = bool(settings.get("norm_pix_loss"))
        values["mlp_ratio"] = settings["intermediate_size"] / settings["hidden_size"]
        decoder_ratio = settings["decoder_intermediate_size"] / settings["decoder_hidden_size"]
    except KeyError as e:
        raise WeightsError(f"{folder}/config.json has no {e}: save the model again with transformers") from None
    except (TypeError, ZeroDivisionError):
        raise WeightsError(f"{folder}/config.json is damaged: its sizes are no numbers above zero") from None
    if decoder_ratio != values["mlp_ratio"]:
        raise WeightsError(f"{folder}: encoder and decoder have different MLP ratios, which is not supported")
    if (folder / "preprocessor_config.json").is_file():
        values |= _pixels(_json(folder / "preprocessor_config.json"))
    return values


def _side(value: Any) -> Any:
    """One side of a square; some configs give both."""
    return value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value


def _pixels(images: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of pixels in 0 .. 1, from the config of an image processor, which scales bytes by a factor of
    its own before."""
    if images.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    elif "image_mean" in images and "image_std" in images:
        mean, std = (
            [v] * 3 if isinstance(v := images[f"image_{name}"], int | float) else v for name in ("mean", "std")
        )
    else:
        return {}
    factor = 255 * (images.get("rescale_factor") or 1 / 255) if images.get("do_rescale", True) else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor
    return {"mean": tuple(v / factor for v in mean), "std": tuple(v / factor for v in std)}


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors in our names, options). Raises WeightsError."""
    values = options(folder)
    tensors = folders.tensors(folder, folders.TRANSFORMERS)
    if not any(name.startswith("decoder.") for name in tensors):
        raise WeightsError(f"{folder} holds the encoder alone (a ViTMAEModel): save the whole ViTMAEForPreTraining")
    return _renamed(tensors), values


def write(model, folder: Path) -> None:
    """Write a MaskedAutoencoder so that ViTMAEForPreTraining.from_pretrained and its image processor read it."""
    folder.mkdir(parents=True, exist_ok=True)
    o, names = model.options, {}
    for theirs, ours in _REST.items():
        names |= {ours: theirs, f"{ours}.weight": f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if not rest.startswith("blocks."):
            tensors[names[name]] = tensor
            continue
        number, inner = rest.removeprefix("blocks.").split(".", 1)
        prefix = f"vit.encoder.layer.{number}" if part == "encoder" else f"decoder.decoder_layers.{number}"
        inner, _, kind = inner.rpartition(".")
        if inner == "attn.qkv":
            for which, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"{prefix}.attention.attention.{which}.{kind}"] = piece
        else:
            theirs = next(t for t, ours in _BLOCK.items() if ours == inner)
            tensors[f"{prefix}.{theirs}.{kind}"] = tensor
    tensor_files.save(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {theirs: getattr(o, ours) for ours, theirs in _OPTIONS.items()}
    settings |= {
        "model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"], "hidden_act": "gelu", "qkv_bias": True,
        "num_channels": 3, "intermediate_size": int(o.width * o.mlp_ratio),
        "decoder_intermediate_size": int(o.decoder_width * o.mlp_ratio), "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "mask_ratio": 0.75, "norm_pix_loss": o.norm_pix_loss,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    images = {"image_processor_type": "ViTImageProcessor", "size": {"height": o.image_size, "width": o.image_size},
              "image_mean": list(o.mean), "image_std": list(o.std)}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their names to ours, with q, k and v joined; unknown names are kept, so that filling the model reports them."""
    renamed: dict[str, torch.Tensor] = {}
    pieces: dict[str, list] = {}
    for name, tensor in tensors.items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            stem, _, kind = name.rpartition(".")
            ours = _REST.get(name) or (f"{_REST[stem]}.{kind}" if stem in _REST else name)
            renamed[ours] = tensor
            continue
        part, number, inner, kind = layer.groups()
        prefix = f"{'encoder' if part == 'vit' else 'decoder'}.blocks.{number}"
        if inner in _QKV:
            pieces.setdefault(f"{prefix}.attn.qkv.{kind}", [None] * 3)[_QKV[inner]] = tensor
        else:
            renamed[f"{prefix}.{_BLOCK.get(inner, inner)}.{kind}"] = tensor
    return renamed | {name: torch.cat(three) for name, three in pieces.items() if all(t is not None for t in three)}


def _json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, OSError, TypeError, RecursionError):
        raise WeightsError(f"{path} is missing or damaged: save the model again with transformers") from None
