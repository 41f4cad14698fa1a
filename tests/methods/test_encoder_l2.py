"""The paper's loss against its formula, computed anew in float64."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from support import runs
from support.models import TINY

from unlearn import config, views
from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods.encoder_l2 import EncoderL2, distance
from unlearn.models import base, weights

RETAIN, FORGET = 3, 2


def make(**settings) -> EncoderL2:
    return runs.method(**settings)


@pytest.fixture
def pair():
    """(student, teacher): two models of other weights, in float64, without decoders."""
    models = [weights.build(config.Model(options=TINY), seed).double() for seed in (1, 2)]
    for model in models:
        model.drop_decoder()
    return models


def batch_of(seed: int = 9, rows: int = RETAIN + FORGET, retain: int = RETAIN) -> Batch:
    images = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.7 + 0.2
    return Batch(
        images, views.draw([config.ViewSpec(kind="random", size=0.5)], 4, rows, np.random.default_rng(0)), retain, seed
    )


def expected_noise(batch: Batch, kind: str, pixels: torch.Tensor, model) -> torch.Tensor:
    noise = torch.randn(FORGET, 3, 32, 32, generator=torch.Generator().manual_seed(batch.seed), dtype=torch.float64)
    if kind == "batch":
        mean = batch.images.mean()
        return mean + noise * ((batch.images - mean).square().sum() / (batch.images.numel() - 1)).sqrt()
    if kind == "dataset":
        channels = model.normalise(pixels).double().permute(1, 0, 2, 3).reshape(3, -1).numpy()
        mix = np.linalg.cholesky(np.cov(channels) + 1e-8 * np.eye(3))
        return torch.from_numpy(np.einsum("dc,nchw->ndhw", mix, noise.numpy()) + channels.mean(1).reshape(1, 3, 1, 1))
    return noise


@pytest.mark.parametrize("alpha", [0, 0.25, 2])
@pytest.mark.parametrize("kind", ["standard", "batch", "dataset"])
def test_the_loss_is_the_formula_with_two_separate_teachers(pair, kind, alpha):
    student, teacher = pair
    method, batch = make(noise=kind, alpha=alpha), batch_of()
    pixels = torch.randint(0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    method.prepare(student.normalise(pixels))
    parts = runs.losses(method, batch, student, teacher)
    with torch.no_grad():
        of_retain, of_forget = batch.view.rows(0, RETAIN), batch.view.rows(RETAIN, RETAIN + FORGET)
        noise = expected_noise(batch, kind, pixels, teacher)
        seen = student.encode(batch.images[:RETAIN], of_retain), student.encode(batch.images[RETAIN:], of_forget)
        wanted = teacher.encode(batch.images[:RETAIN], of_retain), teacher.encode(noise, of_forget)
        retain, forget = (((a - b) ** 2).sum() / a.numel() for a, b in zip(seen, wanted, strict=True))
    assert float(parts["retain"]) == pytest.approx(float(retain), rel=1e-6)
    assert float(parts["forget"]) == pytest.approx(float(forget), rel=1e-6)
    assert float(parts["loss"].detach()) == pytest.approx(float(retain + alpha * forget), rel=1e-6)
    assert parts["loss"].requires_grad and not parts["retain"].requires_grad and not parts["forget"].requires_grad


def test_the_gradient_is_that_of_the_loss(pair):
    student, teacher = pair
    method, batch = make(), batch_of()
    some = [student.encoder.cls_token, student.encoder.blocks[0].attn.qkv.bias, student.encoder.norm.weight]
    assert torch.autograd.gradcheck(lambda *_: runs.losses(method, batch, student, teacher)["loss"], some)


def test_only_the_student_gets_a_gradient_and_the_target_never_sees_a_forget_image(pair):
    student, teacher = pair
    batch, method = batch_of(), make()
    runs.losses(method, batch, student, teacher)["loss"].backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())
    inputs = []
    teacher.encode = lambda images, view, seed: inputs.append(images) or student.encode(images, view)
    other = batch.images.clone()
    other[RETAIN:] += 1
    for images in (batch.images, other):
        runs.losses(method, dataclasses.replace(batch, images=images), student, teacher)
    assert torch.equal(*inputs) and torch.equal(inputs[0][:RETAIN], batch.images[:RETAIN])


def test_a_copy_of_the_teacher_has_no_retain_loss(pair):
    parts = runs.losses(make(), batch_of(), copy.deepcopy(pair[1]), pair[1])
    assert float(parts["retain"]) == 0 and float(parts["forget"]) > 0.01


@pytest.mark.parametrize("kind", ["standard", "batch", "dataset"])
def test_noise_is_a_function_of_the_seed_with_the_measured_spread(pair, kind):
    method, model = make(noise=kind), pair[0]
    generator = torch.Generator().manual_seed(4)
    first = torch.randint(0, 256, (64, 1, 32, 32), generator=generator, dtype=torch.uint8)
    pixels = torch.cat([first, 255 - first // 2, first // 4], dim=1)  # channels that go with and against each other
    method.prepare(model.normalise(pixels))
    images = model.normalise(pixels).double()
    batch = Batch(images, batch_of(rows=64).view, 0, 11)
    noise = method.noise(batch, model)
    assert torch.equal(noise, method.noise(batch, model)) and noise.shape == images.shape
    assert not torch.equal(noise, method.noise(dataclasses.replace(batch, seed=12), model))
    flat = noise.transpose(0, 1).flatten(1)
    if kind == "dataset":
        channels = images.transpose(0, 1).flatten(1)
        mean, covariance = channels.mean(1), torch.cov(channels)
    else:
        scale = images.std() if kind == "batch" else 1.0
        mean = (images.mean() if kind == "batch" else torch.tensor(0.0)).expand(3).double()
        covariance = torch.eye(3, dtype=torch.float64) * scale**2
    spread = covariance.diagonal().sqrt()
    assert ((flat.mean(1) - mean).abs() < 0.02 * spread).all()
    assert ((torch.cov(flat) - covariance).abs() < 0.03 * torch.outer(spread, spread)).all()


def test_noise_in_the_hole_alone_keeps_what_is_seen(pair):
    batch = batch_of()
    noise = make(noise_region="hole").noise(batch, pair[0])
    hole = batch.view.rows(RETAIN, RETAIN + FORGET).pixel_mask(32).expand_as(noise)
    assert (
        torch.equal(noise[~hole], batch.images[RETAIN:][~hole])
        and not torch.isclose(noise[hole], batch.images[RETAIN:][hole]).all()
    )


def test_noise_in_the_hole_is_refused_where_the_encoder_never_sees_it():
    with pytest.raises(ConfigError, match="noise_region hole: the encoder of mae never sees the hole"):
        make(noise_region="hole").check(base.adapter("mae"))
    make().check(base.adapter("mae"))


def test_levels_are_summed_and_low_precision_is_measured_in_float32():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    levels = distance([a, a[:, :1]], [b, b[:, :1]])
    assert float(levels) == pytest.approx(float(((a - b) ** 2).mean() + ((a - b)[:, :1] ** 2).mean()))
    assert distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_relative_distance_weighs_levels_alike():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    relative = float(distance([a, 100 * a], [b, 100 * b], relative=True))
    assert relative == pytest.approx(float(2 * ((a - b) ** 2).mean() / (b**2).mean()))


def test_token_inputs_have_no_covariance():
    tokens = type("Tokens", (base.adapter("mae"),), {"family": "tokens", "continuous": False})
    with pytest.raises(ConfigError, match="noise batch: the inputs of tokens are tokens"):
        make(noise="batch").check(tokens)
    make().check(tokens)
