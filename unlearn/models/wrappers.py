"""Of a training checkpoint the weights of one model: what holds them, and what wrappers put before their names."""

import argparse
import logging
from typing import Any

import torch

from unlearn.errors import WeightsError

# Where a training checkpoint keeps its weights, and where the moving average of them.
WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "params", "net", "network")
AVERAGES = (
    "model_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "params_ema", "g_ema",
)  # fmt: skip
# Where it keeps the arguments that its program was called with.
ARGUMENTS = ("args", "hyper_parameters", "config", "cfg", "opt")
# First words of names that averages and teachers have, where another model lies beside them.
_COPIES = {"ema_model", "model_ema", "ema", "teacher", "target", "target_encoder", "averaged_model", "g_ema"}
# First words of names that are a model's own, which all names of a file may share.
_OWN = {
    "encoder", "decoder", "shared", "first_stage", "vit", "denoise_fn", "synthesis", "vqgan", "quantize", "blocks",
    "layers", "features", "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks",
    "first_stage_model", "cond_stage_model", "conditioner",
}  # fmt: skip
_STABLE_DIFFUSION = "model.diffusion_model."
logger = logging.getLogger(__name__)


def chosen(content: Any, uri: str) -> dict[str, torch.Tensor]:
    """The weights in what a file of torch holds; their moving average where it has nothing else. Raises
    WeightsError."""
    while isinstance(content, dict):
        found = [key for key, value in content.items() if key in (*WEIGHTS, *AVERAGES) and isinstance(value, dict)]
        others = [key for key, value in content.items() if _is_model(value)]
        found += [key for key in others if key not in found and _is_average(key)]
        others = [key for key in others if key not in found]
        if not set(found) & set(WEIGHTS) and len(others) > 1:
            raise WeightsError(
                f"{uri} holds several models: {', '.join(str(key)[:40] for key in others[:8])}; save one of them alone"
            )
        key = next((key for key in (*WEIGHTS, *others, *found) if key in found or key in others), None)
        if key is None:
            break
        also = [name for name in found if name != key and name not in WEIGHTS]
        if also:
            logger.info("%s: its %s is taken; it holds %s too, which can be saved alone", uri, key, ", ".join(also))
        content = content[key]
    keys = list(content) if isinstance(content, dict) else []
    if not keys and content != {}:
        raise WeightsError(f"{uri} holds no dictionary of tensors")
    # Numbers and texts beside the tensors, such as a count of steps, are no weights.
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors or not all(isinstance(key, str) for key in tensors):
        there = ", ".join(str(key)[:40] for key in keys[:8])
        raise WeightsError(
            f"{uri} holds no dictionary of tensors"
            + (f": its keys are {there}; save the one of the weights alone" * bool(there))
        )
    return tensors


def arguments(content: Any) -> dict[str, Any]:
    """The arguments that the program which wrote a training checkpoint was called with, where it says them."""
    found: dict[str, Any] = {}
    for key in ARGUMENTS if isinstance(content, dict) else ():
        value = content.get(key)
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        found |= value if isinstance(value, dict) else {}
    return found


def unwrapped(tensors: dict[str, torch.Tensor], uri: str) -> dict[str, torch.Tensor]:
    """The tensors without what wrappers of the model have put before every name (DistributedDataParallel,
    torch.compile, Lightning), and without a second copy beside them. Raises WeightsError."""
    tensors = _one_copy(tensors, uri)
    while tensors and not any(name.startswith(_STABLE_DIFFUSION) for name in tensors):
        words = {name.partition(".")[0] for name in tensors}
        word = words.pop()
        own = word in _OWN and not any(name.startswith("encoder.decoder_") for name in tensors)
        if words or own or word.isdigit() or not all("." in name for name in tensors):
            break
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return {name.replace("._orig_mod.", "."): tensor for name, tensor in tensors.items()}


def _is_average(key: Any) -> bool:
    return key in AVERAGES or (isinstance(key, str) and "ema" in key.lower().split("_"))


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, torch.Tensor) for item in value.values())


def _one_copy(tensors: dict[str, torch.Tensor], uri: str) -> dict[str, torch.Tensor]:
    """Of two copies of a model, known by their first words, the one that is no average and no teacher."""
    averages = [name for name in tensors if name.startswith("model_ema.")]
    mangled = [name for name in averages if name.startswith("model_ema.diffusion_model")]
    if mangled and not any(name.startswith(_STABLE_DIFFUSION) for name in tensors):
        raise WeightsError(
            f"{uri} holds a moving average by names of its own ({mangled[0]}) without the weights that it is of: give "
            "the whole file"
        )
    if averages and len(averages) < len(tensors):
        alone = "" if mangled else "; save it alone to take it"
        logger.info("%s: the moving average in it (model_ema.*) is left out%s", uri, alone)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model_ema.")}
    copies: dict[str, set[str]] = {}
    for name in tensors:
        word, dot, rest = name.partition(".")
        if dot:
            copies.setdefault(word, set()).add(rest)
    if len(copies) != 2 or copies.keys() & _OWN or any(word.isdigit() for word in copies):
        return tensors
    (one, of_one), (other, of_other) = copies.items()
    if of_one != of_other or not any("." in rest for rest in of_one):
        return tensors
    kept = [word for word in (one, other) if word not in _COPIES]
    if len(kept) != 1:
        raise WeightsError(f"{uri} holds two copies of a model, {one}.* and {other}.*: save one of them alone")
    left = other if kept == [one] else one
    logger.info(
        "%s: of two copies in it, %s.* is taken and %s.* left out; save that alone to take it", uri, *kept, left
    )
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{kept[0]}.")}
