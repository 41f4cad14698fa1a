"""A public checkpoint of MAGE in a small shape, and our model with its weights."""

import argparse

import pytest
import torch
from support.mage import (
    CODES,
    GRID,
    MEAN,
    STD,
    build,
    double,
    latents_of,
    mage_names,
    pictures,
    randoms,
    tokenizer_names,
)

from unlearn.models.mage import MaskedGenerativeEncoder


@pytest.fixture(scope="module")
def public_mage() -> dict[str, torch.Tensor]:
    return randoms(mage_names(), 0) | {"token_emb.position_ids": torch.arange(1 + GRID * GRID)[None]}


@pytest.fixture(scope="module")
def public_tokenizer() -> dict[str, torch.Tensor]:
    """Codes that lie among the latents, so that an image has many of them."""
    tensors = randoms(tokenizer_names(), 1)
    latents = latents_of(double(tensors), pictures(1, seed=9)[0].numpy() * STD + MEAN)
    return tensors | {"quantize.embedding.weight": torch.from_numpy(latents[:CODES]).float()}


@pytest.fixture(scope="module")
def loaded_mage(public_mage, public_tokenizer, tmp_path_factory) -> MaskedGenerativeEncoder:
    """The same weights in our model, by way of one file as the public ones are, the tokenizer under `vqgan.`."""
    path = tmp_path_factory.mktemp("public") / "mage.pth"
    whole = public_mage | {f"vqgan.{name}": tensor for name, tensor in public_tokenizer.items()}
    torch.save({"model": whole, "args": argparse.Namespace(model="mage_vit", lr=1e-3), "epoch": 1599}, path)
    return build(weights=str(path))
