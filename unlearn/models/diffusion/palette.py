"""Checkpoints of Palette (arXiv 2111.05826) as its PyTorch code saves them, `*_Network.pth` and the EMA copy beside it.

The network is diffusers' UNet2DModel under other names. It is not given the timestep t but gamma_t, the share of the
image's variance that is left at t, a number in (0, 1): a model that is given t instead loads, and predicts wrongly.
"""

import re
from pathlib import Path
from typing import Any

import torch

from unlearn.errors import WeightsError
from unlearn.models import wrappers
from unlearn.models.base import tell
from unlearn.models.diffusion.shapes import LINEAR

FILE = "palette_Network.pth"  # what `write` makes; Palette is given the name before `_Network` as `resume_state`
ROOT = "denoise_fn."
HEAD_WIDTH = 32  # channels of an attention head; no tensor tells it
# Their names within a residual block -> diffusers'.
_RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
_SINGLE = {
    "cond_embed.0": "time_embedding.linear_1", "cond_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out", "out.2": "conv_out", "middle_block.1.norm": "mid_block.attentions.0.group_norm",
    "middle_block.1.proj_out": "mid_block.attentions.0.to_out.0",
}  # fmt: skip
_WHOLE = "give the whole *_Network.pth"
_QKV, _ATTENTION = "middle_block.1.qkv", "mid_block.attentions.0"


def is_palette(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether these are the tensors of such a file, or of its network alone."""
    return any(name.startswith(ROOT) for name in tensors) or {"cond_embed.0.weight", "out.2.weight"} <= set(tensors)


def without_schedule(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without the buffers of Palette's schedule."""
    buffers = _buffers(torch.full((1,), 0.5, dtype=torch.float64))
    return {name: tensor for name, tensor in tensors.items() if name not in buffers}


def options(tensors: dict[str, torch.Tensor], scheduled: bool = False) -> dict[str, Any]:
    """The options of the model in such a file: its network and the schedule that it was trained with. Raises
    WeightsError. scheduled: whether the config names a schedule, so that the file need not."""
    network = _network(tensors)
    levels, blocks = _shape(network)
    try:
        widths = [
            network[f"input_blocks.{1 + level * (blocks + 1)}.0.out_layers.3.weight"].shape[0]
            for level in range(levels)
        ]
        stem, told = network["input_blocks.0.0.weight"], network["cond_embed.0.weight"].shape[1]
    except KeyError as e:
        raise WeightsError(f"this Palette file lacks a part of its network ({e}): {_WHOLE}") from None
    if not stem.shape[0] == widths[0] == told:
        raise WeightsError("a Palette network whose first level is not as wide as its `inner_channel` is not supported")
    return {
        "conditioning": "gamma",
        "scheduler": LINEAR if scheduled else _schedule(tensors),
        "network": {
            "class": "UNet2DModel", "in_channels": stem.shape[1], "out_channels": network["out.2.weight"].shape[0],
            "block_out_channels": widths, "layers_per_block": blocks,
            "down_block_types": ["ResnetDownsampleBlock2D"] * levels,
            "up_block_types": ["ResnetUpsampleBlock2D"] * levels, "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": HEAD_WIDTH, "attn_norm_num_groups": 32,
        },
    }  # fmt: skip


def to_diffusers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of such a file by diffusers' names; those of its schedule, which are no weights, are left out. Raises
    WeightsError."""
    network = _network(tensors)
    places = _places(*_shape(network))
    renamed = {}
    for name, tensor in network.items():
        stem, _, kind = name.rpartition(".")
        if stem == _QKV:
            # Rows are ordered head by head, and within a head q, k, v.
            heads = tensor.squeeze(-1).unflatten(0, (-1, 3, HEAD_WIDTH))
            for part, letter in enumerate("qkv"):
                renamed[f"{_ATTENTION}.to_{letter}.{kind}"] = heads[:, part].flatten(0, 1)
        elif stem == "middle_block.1.proj_out":
            renamed[f"{_SINGLE[stem]}.{kind}"] = tensor.squeeze(-1)
        else:
            renamed[f"{places[stem]}.{kind}" if stem in places else name] = tensor
    return renamed


def write(tensors: dict[str, torch.Tensor], options, folder: Path) -> str:
    """Write FILE; the expression that loads it, with FOLDER for its place. Raises WeightsError.

    tensors: the network's, by diffusers' names; options: DiffusionOptions.
    """
    try:
        public = from_diffusers(tensors, options.scheduler)
    except KeyError as e:
        raise WeightsError(f"this network is not Palette's, which has no {e}: no Palette file can be written") from None
    torch.save({name: tensor.contiguous() for name, tensor in public.items()}, folder / FILE)
    return f"netG.load_state_dict(torch.load(FOLDER + '/{FILE}'))"


def from_diffusers(tensors: dict[str, torch.Tensor], scheduler: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The reverse: what Palette's code loads. scheduler: the config of the schedule that the model was trained with."""
    blocks = 1 + max(
        int(match[1]) for name in tensors if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))
    )
    levels = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"down_blocks\.(\d+)\.", name)))
    names = {ours: theirs for theirs, ours in _places(levels, blocks).items()}
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith(f"{_ATTENTION}.to_") and not stem.endswith("to_out.0"):
            continue
        tensor = tensor[..., None] if stem == _SINGLE["middle_block.1.proj_out"] and kind == "weight" else tensor
        renamed[f"{ROOT}{names[stem]}.{kind}"] = tensor
    for kind in ("weight", "bias"):
        parts = [tensors[f"{_ATTENTION}.to_{letter}.{kind}"].unflatten(0, (-1, HEAD_WIDTH)) for letter in "qkv"]
        joined = torch.stack(parts, dim=1).flatten(0, 2)
        renamed[f"{ROOT}{_QKV}.{kind}"] = joined[..., None] if kind == "weight" else joined
    return renamed | _buffers(_betas(scheduler))


def _network(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's tensors. Where it was saved alone they have no prefix."""
    named = {name.removeprefix(ROOT): tensor for name, tensor in tensors.items() if name.startswith(ROOT)}
    return wrappers.unwrapped(named, ROOT) or without_schedule(tensors)


def _shape(network: dict[str, torch.Tensor]) -> tuple[int, int]:
    """(levels, residual blocks a level). Raises WeightsError where it is another network than Palette's."""
    up = {int(match[1]) for name in network if (match := re.match(r"output_blocks\.(\d+)\.", name))}
    levels = 1 + len({name.split(".")[1] for name in network if re.match(r"output_blocks\.\d+\.1\.in_layers", name)})
    if not up or len(up) % levels or "input_blocks.0.0.weight" not in network:
        raise WeightsError(f"this Palette file lacks a part of its network: {_WHOLE}")
    if any(re.match(r"(in|out)put_blocks\.\d+\.\d+\.qkv", name) for name in network):
        raise WeightsError("a Palette network with attention outside its middle is not supported")
    return levels, len(up) // levels - 1


def _places(levels: int, blocks: int) -> dict[str, str]:
    """Palette's name of every layer -> diffusers'."""
    modules, down, up = {}, 1, 0
    for level in range(levels):
        for block in range(blocks):
            modules[f"input_blocks.{down}.0"] = f"down_blocks.{level}.resnets.{block}"
            down += 1
        if level < levels - 1:
            modules[f"input_blocks.{down}.0"] = f"down_blocks.{level}.downsamplers.0"
            down += 1
        for block in range(blocks + 1):
            modules[f"output_blocks.{up}.0"] = f"up_blocks.{level}.resnets.{block}"
            if block == blocks and level < levels - 1:
                modules[f"output_blocks.{up}.1"] = f"up_blocks.{level}.upsamplers.0"
            up += 1
    modules |= {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    layers = {
        f"{theirs}.{layer}": f"{ours}.{name}" for theirs, ours in modules.items() for layer, name in _RESIDUAL.items()
    }
    return layers | _SINGLE


def _schedule(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The config of a scheduler with the file's `gammas`, the products of 1 - beta; the one that Palette trains with
    where the file has none."""
    if (gammas := tensors.get("gammas")) is None:
        tell(
            "a Palette file without its `gammas`: the schedule that Palette trains with by default is taken (2,000 "
            "steps, beta from 1e-6 to 0.01); model.options.scheduler names another"
        )
        return LINEAR
    kept, coarse = gammas.double(), {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(gammas.dtype)
    if len(kept) == LINEAR["num_train_timesteps"] and torch.allclose(
        kept, _betas(LINEAR).neg().add(1).cumprod(0), coarse or 1e-4
    ):
        return LINEAR
    if kept.ndim != 1 or not len(kept) or not ((kept > 0) & (kept <= 1)).all() or (kept.diff() > 0).any():
        raise WeightsError("the `gammas` of this Palette file are no schedule: they must fall, between 1 and 0")
    if coarse:
        raise WeightsError(
            "the `gammas` of this Palette file were rounded to 16 bits, and are not those that Palette trains with by "
            "default: give the schedule as model.options.scheduler, or the file in float32"
        )
    lost = 1 - kept
    # Near 1 a gamma in float32 says little of 1 - gamma; sqrt(1 / gamma - 1) says it to all digits.
    odds = tensors.get("sqrt_recipm1_gammas", torch.empty(0)).double().square()
    if odds.shape == lost.shape and torch.allclose(odds / (1 + odds), lost, rtol=0, atol=1e-6):
        lost = odds / (1 + odds)
    former = torch.cat([torch.zeros(1, dtype=torch.float64), lost[:-1]])
    betas = (lost - former) / (1 - former)
    if not ((betas >= 0) & (betas < 1)).all():
        raise WeightsError("the `gammas` of this Palette file are no schedule: they must fall, between 1 and 0")
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "prediction_type": "epsilon"}


def _betas(scheduler: dict[str, Any]) -> torch.Tensor:
    """(T,) in float64, as Palette computes its buffers."""
    if "trained_betas" in scheduler:
        return torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    if scheduler.get("beta_schedule", "linear") != "linear":
        raise WeightsError(f"Palette's files know linear schedules, not {scheduler['beta_schedule']}")
    return torch.linspace(
        scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"], dtype=torch.float64
    )


def _buffers(betas: torch.Tensor) -> dict[str, torch.Tensor]:
    """The buffers of the schedule."""
    kept = (1 - betas).cumprod(0)
    former = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    variance = betas * (1 - former) / (1 - kept)
    held = {
        "gammas": kept, "sqrt_recip_gammas": (1 / kept).sqrt(), "sqrt_recipm1_gammas": (1 / kept - 1).sqrt(),
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * former.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - former) * (1 - betas).sqrt() / (1 - kept),
    }  # fmt: skip
    return {name: tensor.float() for name, tensor in held.items()}
