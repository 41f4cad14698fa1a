"""Training inside an audit: a few steps of a copy of a model, by the loss that its family is trained with."""

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import nn

from unlearn import config, views
from unlearn.data import order
from unlearn.models import weights
from unlearn.models.base import Adapter

STREAM = 1 << 27  # of the random numbers of an audit: those of training


def copied(model: Adapter) -> Adapter:
    """A copy whose parameters may be trained; the first stage stays frozen."""
    made = copy.deepcopy(model).requires_grad_(True)
    for part in (made.first_stage, made.shared):
        if part is not None:
            part.requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.startswith(made.first_stage_names):  # of the decoder, what leads back from latents
            parameter.requires_grad_(False)
    return made


def with_fresh_decoder(model: Adapter, seed: int) -> Adapter:
    """A copy with a decoder of random weights, which alone may be trained."""
    made = copied(model).requires_grad_(False)
    shape = config.Model(family=model.family, options=model.options.model_dump(mode="json"))
    fresh = weights.build(shape, seed)
    assert made.decoder is not None and fresh.decoder is not None, "both were built with one"
    random = dict(fresh.decoder.named_parameters())
    for name, parameter in made.decoder.named_parameters():
        if not f"decoder.{name}".startswith(made.first_stage_names):
            parameter.data.copy_(random[name])
            parameter.requires_grad_(True)
    return made


def tune(
    model: Adapter, pixels: torch.Tensor, specs: Sequence[config.ViewSpec], steps: int, batch_size: int, lr: float,
    seed: int,
    at: Iterable[int] = (), seen: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """AdamW on the parameters that require a gradient, over images drawn with the seed. pixels: uint8 (N, 3, S, S).

    at: steps behind which `seen` is called, 0 is before the first.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, stops = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0), set(at)
    if 0 in stops:
        seen(0)
    for step in range(1, steps + 1):
        rng = order.generator(seed, STREAM, step)
        rows = torch.from_numpy(rng.integers(0, len(pixels), batch_size)).to(pixels.device)
        view = views.draw(list(specs), model.grid, batch_size, rng).to(pixels.device)
        with torch.no_grad():
            inputs = model.inputs(model.normalise(pixels[rows]), view)
        optimizer.zero_grad()
        model.training_loss(inputs, view, int(rng.integers(1 << 31))).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step in stops:
            seen(step)


def rounds(steps: int) -> list[int]:
    """0, then about evenly on a logarithmic scale: 1, 2, 5, 10, ... up to `steps`."""
    marks = [0] + [m * 10**p for p in range(7) for m in (1, 2, 5) if m * 10**p < steps] + [steps]
    return sorted(set(np.array(marks).tolist()))
