"""What every family of generators and every method must hold, over both registries."""

import copy
import textwrap

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unlearn import config, views
from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods import base as methods
from unlearn.models import base, weights

# A small shape of each family; a family without one fails here.
SMALL = {"mae": TINY}
RETAIN, FORGET = 3, 2

families = pytest.mark.parametrize("family", base.MODELS)


def build(family: str, seed: int = 1) -> base.Adapter:
    return weights.build(config.Model(family=family, options=SMALL[family]), seed)


def batch_for(model: base.Adapter, rows: int = RETAIN + FORGET, kind: str = "random", size: float = 0.6) -> Batch:
    side = model.options.image_size
    pixels = torch.randint(0, 256, (rows, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    view = views.draw([config.View(kind=kind, size=size)], model.grid, rows, np.random.default_rng(0))
    return Batch(model.normalise(pixels), view, RETAIN, 5)


def levels(embedding: base.Embedding) -> list[torch.Tensor]:
    return [embedding] if isinstance(embedding, torch.Tensor) else embedding


@families
def test_embeddings_and_images_have_one_row_an_image_and_repeat_exactly(family):
    model = build(family)
    batch = batch_for(model)
    with torch.no_grad():
        first, again = (levels(model.encode(batch.images, batch.view)) for _ in range(2))
        images = model.reconstruct(batch.images, batch.view)
        assert torch.equal(images, model.reconstruct(batch.images, batch.view))
        loss = model.training_loss(batch.images, batch.view)
    assert all(torch.equal(a, b) and len(a) == len(batch.images) and a.isfinite().all() for a, b in zip(first, again, strict=True))
    assert images.shape == batch.images.shape and images.isfinite().all() and loss.shape == () and loss.isfinite()


@families
def test_rows_of_a_batch_do_not_see_each_other(family):
    model = build(family)
    batch = batch_for(model)
    with torch.no_grad():
        for a, b in zip(*(levels(model.encode(batch.images[:n], batch.view.rows(0, n))) for n in (2, 5)), strict=True):
            torch.testing.assert_close(a, b[:2], atol=1e-5, rtol=1e-5)


@families
@pytest.mark.parametrize("kind, size", [("centre", 0.5), ("outpaint", 0.5), ("random", 0.75), ("box", 0.3), ("brush", 0.4)])
def test_visible_pixels_stay_to_the_bit_and_hidden_ones_are_never_copied(family, kind, size):
    model = build(family)
    batch = batch_for(model, kind=kind, size=size)
    mask = batch.view.pixel_mask(batch.images.shape[-1]).expand_as(batch.images)
    with torch.no_grad():
        images = model.reconstruct(batch.images, batch.view)
        hidden_changed = torch.where(mask, torch.zeros_like(batch.images), batch.images)
        assert torch.equal(images[~mask], batch.images[~mask])
        assert torch.equal(images, model.reconstruct(hidden_changed, batch.view))


@families
def test_normalise_and_denormalise_are_inverse(family):
    model = build(family)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal((model.denormalise(model.normalise(pixels)) * 255).round().byte(), pixels)
    assert model.denormalise(torch.full((1, 3, 2, 2), 99.0)).max() == 1


@families
def test_encoder_and_decoder_share_nothing_and_are_the_whole_model(family):
    model = build(family)
    encoder, decoder = ({id(t) for t in (*m.parameters(), *m.buffers())} for m in (model.encoder, model.decoder))
    assert encoder and decoder and not encoder & decoder
    assert {id(p) for p in model.parameters()} <= encoder | decoder
    batch = batch_for(model)
    before = levels(model.encode(batch.images, batch.view))
    model.drop_decoder()
    after = levels(model.encode(batch.images, batch.view))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {n.split(".")[0] for n in model.state_dict()} == {"encoder"}


@families
def test_no_dropout_in_training_mode(family):
    model = build(family)
    batch = batch_for(model)
    with torch.no_grad():
        for a, b in zip(*(levels(m.encode(batch.images, batch.view)) for m in (model, copy.deepcopy(model).train())), strict=True):
            assert torch.equal(a, b)


@families
def test_saved_and_loaded_it_is_the_same_model(family, tmp_path):
    model = build(family)
    weights.write(model, str(tmp_path), {})
    back = weights.build(config.Model(family=family, weights=str(tmp_path)))
    assert back.options == model.options and back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())


@families
@pytest.mark.parametrize("kind, size", [("centre", 0.5), ("random", 0.75)])
def test_flops_are_those_that_torch_counts(family, kind, size):
    model = build(family)
    batch = batch_for(model, kind=kind, size=size)
    # torch counts the products of attention only where they are plain ones.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(batch.images, batch.view)
    assert model.flops(batch.view) * len(batch.images) == pytest.approx(counter.get_total_flops(), rel=0.05)


@families
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_trains_what_it_says_and_nothing_else(family, name):
    method = methods.create(config.Method(name=name))
    student, teacher = build(family, 1), build(family, 2)
    method.check(type(student))
    method.prepare((student.denormalise(batch_for(student).images) * 255).byte(), student)
    if not method.needs_decoder:
        student.drop_decoder()
        teacher.drop_decoder()
    before = {n: t.clone() for n, t in (*student.state_dict().items(), *((f"teacher {n}", t) for n, t in teacher.state_dict().items()))}
    parts = method.loss(batch_for(student), student, teacher if method.needs_teacher else None)
    assert parts["loss"].shape == () and parts["loss"].requires_grad and len(parts) > 1
    assert all(not p.requires_grad and p.isfinite() and p.shape == () for n, p in parts.items() if n != "loss")
    parts["loss"].backward()
    trained = {id(p) for p in method.trainable(student)}
    moved = {id(p) for p in student.parameters() if p.grad is not None and p.grad.any()}
    assert moved and moved <= trained and all(p.grad is None for p in teacher.parameters())
    after = {**student.state_dict(), **{f"teacher {n}": t for n, t in teacher.state_dict().items()}}
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    again = method.loss(batch_for(student), student, teacher if method.needs_teacher else None)
    assert torch.equal(parts["loss"], again["loss"])


@families
def test_the_papers_method_leaves_the_decoder_alone(family):
    method, student = methods.create(config.Method()), build(family, 1)
    method.loss(batch_for(student), student, build(family, 2))["loss"].backward()
    assert all(p.grad is not None for p in student.encoder.parameters())
    assert all(p.grad is None for p in student.decoder.parameters())


TOY = """
    import torch
    from torch import nn
    from unlearn.models import base

    class Toy(base.Adapter):
        family = "toy"
        variants = {"small": {"image_size": 16}}
        grid = 4

        def __init__(self, options):
            super().__init__(options)
            self.encoder, self.decoder = nn.Conv2d(3, 5, 4, 4), nn.Conv2d(5, 3, 1)

        def encode(self, images, view):
            skip = self.encoder(torch.where(view.pixel_mask(images.shape[-1]), 0, images))
            return [skip, skip.mean((2, 3))]

        def reconstruct(self, images, view):
            filled = self.decoder(self.encode(images, view)[0]).repeat_interleave(4, 2).repeat_interleave(4, 3)
            return torch.where(view.pixel_mask(images.shape[-1]), filled, images)

        def training_loss(self, images, view):
            return (self.reconstruct(images, view) - images).square().mean()

        def flops(self, view):
            return 2 * 16 * 5 * 48
    """


def test_a_new_family_is_one_file_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "toy_family.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "MODELS", dict(base.MODELS))
    monkeypatch.setitem(SMALL, "toy", {"image_size": 16})
    base.register("toy", "toy_family:Toy")
    assert weights.build(config.Model(family="toy", variant="small")).options.image_size == 16
    for name in methods.METHODS:
        test_a_method_trains_what_it_says_and_nothing_else("toy", name)
    test_saved_and_loaded_it_is_the_same_model("toy", tmp_path / "saved")
    test_flops_are_those_that_torch_counts("toy", "centre", 0.5)
    with pytest.raises(ConfigError, match="toy is registered already, at toy_family:Toy"):
        base.register("toy", "elsewhere:Toy")


def test_a_method_twice_and_a_method_unknown_are_errors():
    with pytest.raises(ConfigError, match="encoder_l2 is registered already"):
        methods.register("encoder_l2", "elsewhere:Method")
    with pytest.raises(ConfigError, match="no method 'magic'; known: encoder_l2"):
        methods.method_class("magic")
