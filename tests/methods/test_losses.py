"""The losses of the other methods against their formulas, computed anew in float64, and what the stateful ones do step
by step."""

import dataclasses

import numpy as np
import pytest
import torch
from support import runs
from support.models import RETAIN, SMALL, TINY, batch_for, build, cached, levels

from unlearn import config
from unlearn.errors import ConfigError
from unlearn.methods.encoder_l2 import blurred
from unlearn.models import base, weights
from unlearn.training import apart

F = slice(RETAIN, None)


@pytest.fixture(scope="module")
def mae():
    """(student, teacher, batch): two autoencoders of other weights, and a batch, in float64."""
    models = [weights.build(config.Model(options=TINY), seed).double() for seed in (1, 2)]
    batch = batch_for(models[0])
    return *models, dataclasses.replace(batch, images=batch.images.double())


def parts_of(method, mae) -> dict[str, float]:
    student, teacher, batch = mae
    found = runs.losses(method, batch, student, teacher)
    assert found["loss"].requires_grad
    return {name: float(value.detach()) for name, value in found.items()}


def reconstructed(model, images, view) -> np.ndarray:
    """What the model fills the hidden pixels with, (B, pixels)."""
    hidden = view.pixel_mask(images.shape[-1]).expand_as(images).numpy()
    made = model.reconstruct(images, view).detach().numpy()
    return np.stack([row[mask] for row, mask in zip(made, hidden, strict=True)])


def hidden_of(images, view) -> np.ndarray:
    hidden = view.pixel_mask(images.shape[-1]).expand_as(images).numpy()
    return np.stack([row[mask] for row, mask in zip(images.numpy(), hidden, strict=True)])


def noise_of(batch) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch.seed)
    return torch.randn(batch.images[F].shape, generator=generator, dtype=torch.float64)


def test_max_loss_falls_on_retain_and_rises_on_forget(mae):
    student, _, batch = mae
    error = (reconstructed(student, batch.images, batch.view) - hidden_of(batch.images, batch.view)) ** 2
    found = parts_of(runs.method("max_loss", alpha=0.7), mae)
    assert found["retain"] == pytest.approx(error[:RETAIN].mean()) and found["forget"] == pytest.approx(error[F].mean())
    assert found["loss"] == pytest.approx(error[:RETAIN].mean() - 0.7 * error[F].mean())


def test_noisy_label_asks_for_noise_in_the_hole(mae):
    student, _, batch = mae
    made, wanted = reconstructed(student, batch.images, batch.view), hidden_of(batch.images, batch.view)
    wanted[F] = hidden_of(noise_of(batch), batch.view.rows(RETAIN, len(batch.images)))
    error = (made - wanted) ** 2
    found = parts_of(runs.method("noisy_label", alpha=0.7), mae)
    assert found["loss"] == pytest.approx(error[:RETAIN].mean() + 0.7 * error[F].mean())


def test_retain_label_asks_for_the_originals_output_on_retain_images(mae):
    student, teacher, batch = mae
    others = torch.cat([batch.images[:RETAIN], batch.images[[0, 1]]])
    error = (reconstructed(student, batch.images, batch.view) - reconstructed(teacher, others, batch.view)) ** 2
    found = parts_of(runs.method("retain_label", alpha=0.7), mae)
    assert found["loss"] == pytest.approx(error[:RETAIN].mean() + 0.7 * error[F].mean())


@pytest.mark.parametrize("shape", ["mae", "migan"])
def test_random_encoder_asks_for_noise_of_each_levels_own_spread(shape):
    student, teacher = (build(shape, seed).double() for seed in (1, 2))
    batch = batch_for(student)
    batch = dataclasses.replace(batch, images=batch.images.double())
    found = parts_of(runs.method("random_encoder", alpha=0.7), (student, teacher, batch))
    generator, retain, forget = torch.Generator().manual_seed(batch.seed), 0.0, 0.0
    with torch.no_grad():
        pairs = zip(*(levels(m.encode(batch.images, batch.view)) for m in (student, teacher)), strict=True)
        for mine, theirs in pairs:
            level = theirs[F].numpy()
            noise = torch.randn(level.shape, generator=generator, dtype=torch.float64).numpy()
            retain += float(((mine - theirs)[:RETAIN] ** 2).mean())
            forget += ((mine[F].numpy() - (noise * level.std(ddof=1) + level.mean())) ** 2).mean()
    assert found["retain"] == pytest.approx(retain) and found["loss"] == pytest.approx(retain + 0.7 * forget)


@pytest.mark.parametrize("target", ["blur", "retain"])
def test_a_plausible_target_takes_the_place_of_noise(mae, target):
    student, teacher, batch = mae
    found = parts_of(runs.method(target=target, blur=8, alpha=0.7), mae)
    images = batch.images.clone()
    images[F] = blurred(batch.images[F], 8) if target == "blur" else batch.images[[0, 1]]
    with torch.no_grad():
        error = (student.encode(batch.images, batch.view) - teacher.encode(images, batch.view)) ** 2
    assert found["loss"] == pytest.approx(float(error[:RETAIN].mean() + 0.7 * error[F].mean()))
    plain = parts_of(runs.method(alpha=0.7), mae)
    assert found["retain"] == plain["retain"] and found["forget"] != pytest.approx(plain["forget"], rel=1e-3)


def test_blurred_means_cells_of_one_colour_on_average():
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small = images.reshape(2, 3, 2, 16, 2, 16).mean((3, 5))
    assert torch.allclose(blurred(images, 16)[..., :8, :8], small[..., :1, :1].expand(2, 3, 8, 8))
    assert torch.allclose(blurred(images, 100), images.mean((2, 3), keepdim=True).expand_as(images))


@pytest.mark.parametrize("shape", ["diffusion_pixel", "diffusion_latent"])
def test_the_background_has_nothing_in_its_hole(shape):
    student, teacher = build(shape, 1), build(shape, 2)
    batch = cached(student, batch_for(student))
    teacher.take_first_stage(torch.device("cpu"))
    found = parts_of(runs.method(target="background", alpha=1), (student, teacher, batch))
    empty = batch.images.clone()
    hole = batch.view.pixel_mask(empty.shape[-1])[F].expand(-1, empty.shape[1], -1, -1).clone()
    if shape == "diffusion_latent":  # the other half of the channels is the image with a grey hole already
        hole[:, hole.shape[1] // 2 :] = False
    empty[F] = torch.where(hole, 0, empty[F])
    with torch.no_grad():
        pairs = zip(
            student.encode(batch.images, batch.view, batch.seed),
            teacher.encode(empty, batch.view, batch.seed),
            strict=True,
        )
        expected = sum(float(((a - b)[F].double() ** 2).mean()) for a, b in pairs)
    assert found["forget"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options, family, message",
    [
        ({"target": "background"}, "mae", "target background: the encoder of mae never sees the hole"),
        ({"target": "blur"}, "mage", "target blur: the inputs of mage are tokens"),
        ({"target": "blur", "noise": "batch"}, "mae", "noise and noise_region are of target noise"),
    ],
)
def test_a_target_that_means_nothing_is_refused(options, family, message):
    with pytest.raises(ConfigError, match=message):
        runs.method(**options).check(base.adapter(family))


def test_conflicting_gradients_are_projected_tensor_by_tensor():
    generator = torch.Generator().manual_seed(0)
    retain = [torch.randn(4, 5, generator=generator), torch.randn(7, generator=generator)]
    forget = [torch.randn(4, 5, generator=generator), torch.randn(7, generator=generator)]
    forget[0] = forget[0] - 2 * retain[0]  # against
    forget[1] = forget[1] + 2 * retain[1]  # along
    found = runs.method("gradient_projection", alpha=0.7).combine({"retain": retain, "forget": forget}, apart.dot)
    r, f = retain[0].double().numpy().ravel(), forget[0].double().numpy().ravel()
    rest_r, rest_f = r - (r @ f) / (f @ f) * f, f - (r @ f) / (r @ r) * r
    norm = np.linalg.norm
    expected = rest_r / norm(rest_r) * norm(r) + 0.7 * rest_f / norm(rest_f) * norm(f)
    assert r @ f < 0 and np.allclose(found[0].numpy().ravel(), expected, atol=1e-5)
    assert torch.allclose(found[1], retain[1] + 0.7 * forget[1])
    zero = [torch.zeros(3)]
    assert torch.equal(
        runs.method("gradient_projection").combine({"retain": zero, "forget": zero}, apart.dot)[0], zero[0]
    )


def test_epsilon_constrained_finds_the_ends_and_then_keeps_between_them():
    """Two parabolas on a line: f1 = x², f2 = (x - 3)²; with steps of gradient descent r decides where between 0 and 9
    f1 ends."""
    ended = {}
    for r in (0.0, 0.5, 1.0):
        method, x, steps = runs.method("epsilon_constrained", r=r), 3.0, 800
        first, second = method.restarts(steps)
        assert (first, second) == (200, 400)
        for step in range(1, steps + 1):
            method.at(step, steps)
            method.observe({"forget": torch.tensor(x * x), "retain": torch.tensor((x - 3) ** 2)})
            gradients = {"forget": [torch.tensor([2 * x])], "retain": [torch.tensor([2 * (x - 3)])]}
            kept = method.state_dict()
            again = runs.method("epsilon_constrained", r=r)  # one that goes on from a checkpoint
            again.load_state_dict({name: t.clone() for name, t in kept.items()})
            again.at(step, steps)
            again.forget = method.forget
            found = method.combine(gradients, apart.dot)
            assert torch.equal(found[0], again.combine(gradients, apart.dot)[0])
            x -= 0.02 * float(found[0])
            if step in (first, second):
                x = 3.0
        least, most = (float(v) for v in method.known[2:])
        assert least == pytest.approx(0, abs=0.05) and most == pytest.approx(9, abs=0.05)
        ended[r] = x * x
    assert ended[0.5] == pytest.approx(4.5, rel=0.1) and ended[1.0] == pytest.approx(9, rel=0.1) and ended[0.0] < 0.5
    with pytest.raises(ConfigError, match="a run of 2 steps has no room"):
        runs.method("epsilon_constrained").restarts(2)


def test_decoupling_climbs_until_the_outputs_differ_and_keeps_from_then_on(mae):
    student, teacher, batch = mae
    method = runs.method("decoupling", threshold=0.8)
    found = parts_of(method, mae)
    view, images = batch.view.rows(RETAIN, len(batch.images)), batch.images[F]
    mine, theirs = (reconstructed(model, images, view) for model in (student, teacher))
    assert found["difference"] == pytest.approx(((mine - theirs) ** 2).mean() / (theirs**2).mean())
    assert found["loss"] == -found["forget"] != 0
    method.observe({"difference": torch.tensor(0.79)})
    assert parts_of(method, mae)["loss"] == -found["forget"]
    method.observe({"difference": torch.tensor(0.8)})
    method.observe({"difference": torch.tensor(0.1)})  # there is no way back
    resumed = runs.method("decoupling", threshold=0.8)
    resumed.load_state_dict(method.state_dict())
    for one in (method, resumed):
        assert parts_of(one, mae)["loss"] == found["retain"]


def test_decoupling_climbs_by_the_encoder_alone_where_asked(mae):
    student, teacher, batch = mae
    method, view = runs.method("decoupling", threshold=0.8, climb="encoder"), batch.view.rows(RETAIN, len(batch.images))
    mixed = build("mae", 1).double()  # the student's encoder before the original's decoder
    mixed.load_state_dict(student.state_dict())
    mixed.decoder.load_state_dict(teacher.decoder.state_dict())
    error = (reconstructed(mixed, batch.images[F], view) - hidden_of(batch.images[F], view)) ** 2
    found, plain = parts_of(method, mae), parts_of(runs.method("decoupling"), mae)
    assert found["forget"] == pytest.approx(error.mean()) != plain["forget"] and found["retain"] == plain["retain"]
    with pytest.raises(ConfigError, match="no gradient in the decoder"):
        runs.method("decoupling", climb="encoder", saliency=0.5).check(type(student))


@pytest.mark.parametrize("shape", SMALL)
def test_the_decoder_of_any_family_rests_while_the_encoder_climbs(shape):
    student, teacher = build(shape, 1), build(shape, 2).requires_grad_(False)
    batch = cached(student, batch_for(student))
    method = runs.method("decoupling", threshold=0.8, climb="encoder")
    for behind, parts in ((0.0, {"encoder"}), (0.8, {"encoder", "decoder"})):
        method.observe({"difference": torch.tensor(behind)})
        student.zero_grad()
        runs.losses(method, batch, student, teacher)["loss"].backward()
        moved = {n.split(".")[0] for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == parts


@pytest.mark.parametrize("shape", SMALL)
def test_the_loss_of_parts_adds_up_to_the_familys_own(shape):
    """Of any family: rows of predictions and targets, each part with its own view."""
    model = build(shape)
    batch = cached(model, batch_for(model))
    with torch.no_grad():
        made, wanted = model.predict(batch.images, batch.view, 5), model.targets(batch.images, batch.view, 5)
        whole = model.training_loss(batch.images, batch.view, 5)
        parts = [model.loss(made[a:b], wanted[a:b], batch.view.rows(a, b)) for a, b in ((0, RETAIN), (RETAIN, 5))]
        assert float(model.difference(made, made, batch.view)) == 0
        assert float(model.difference(made, made + 1, batch.view)) == pytest.approx(1, rel=1e-4)
    assert float(whole) == pytest.approx(float(3 * parts[0] + 2 * parts[1]) / 5, rel=1e-5)
