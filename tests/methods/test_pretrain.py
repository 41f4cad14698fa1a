"""Plain training: mean squared error on hidden patches, of retain rows alone."""

import dataclasses

import numpy as np
import pytest
import torch
from support import runs
from support.models import TINY

from unlearn import config, views
from unlearn.data.loader import Batch
from unlearn.models import weights


@pytest.fixture(scope="module")
def model():
    return weights.build(config.Model(options=TINY), seed=1)


def batch_of(retain: int = 4) -> Batch:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(
        images, views.draw([config.ViewSpec(kind="random", size=0.6)], 4, 4, np.random.default_rng(0)), retain, 1
    )


def loss(model, batch) -> torch.Tensor:
    return runs.losses(runs.method("pretrain"), batch, model, None)["loss"]


def test_the_loss_is_the_squared_error_of_the_hidden_patches_alone(model):
    batch = batch_of()
    with torch.no_grad():
        hidden = batch.view.pixel_mask(32).expand_as(batch.images)
        error = (model.reconstruct(batch.images, batch.view) - batch.images)[hidden]
        assert float(loss(model, batch)) == pytest.approx(float(error.square().sum() / hidden.sum()), rel=1e-5)


def test_what_is_hidden_is_never_seen(model):
    batch = batch_of()
    hidden = batch.view.pixel_mask(32)
    other = torch.where(hidden, torch.full_like(batch.images, 9.0), batch.images)
    with torch.no_grad():
        assert torch.equal(model.encode(batch.images, batch.view), model.encode(other, batch.view))


def test_a_forget_image_in_the_batch_is_not_learned(model):
    batch = batch_of(retain=2)
    images = batch.images.clone()
    images[2:] = 7
    assert float(loss(model, batch)) == float(loss(model, dataclasses.replace(batch, images=images)))
    whole = batch_of(retain=4)
    half = Batch(whole.images[:2], whole.view.rows(0, 2), 2, 1)
    assert float(loss(model, batch)) == float(loss(model, half)) != float(loss(model, whole))


def test_everything_is_trained(model):
    method = runs.method("pretrain")
    assert {id(p) for p in method.trainable(model)} == {id(p) for p in model.parameters()}
    model.zero_grad()
    loss(model, batch_of()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
