"""What every family of generators and every method must hold, over both registries."""

import copy
import dataclasses
import hashlib
import textwrap

import pytest
import torch
from support import runs
from support.models import SMALL, batch_for, build, cached, embed, levels
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unlearn import config
from unlearn.errors import ConfigError
from unlearn.methods import base as methods
from unlearn.models import base, weights
from unlearn.registry import METHODS, MODELS

shapes = pytest.mark.parametrize("shape", SMALL)


def method_for(model: base.Adapter, name: str) -> methods.Method:
    """The method, or a skip where it says that it is not for this family."""
    method = runs.method(name)
    try:
        method.check(type(model))
    except ConfigError as e:
        pytest.skip(str(e))
    return method


@shapes
def test_embeddings_and_images_have_one_row_an_image_and_repeat_exactly(shape):
    model = build(shape)
    batch = batch_for(model)
    with torch.no_grad():
        first, again = (embed(model, batch) for _ in range(2))
        images = model.reconstruct(batch.images, batch.view)
        assert torch.equal(images, model.reconstruct(batch.images, batch.view))
        loss = model.training_loss(model.inputs(batch.images, batch.view), batch.view)
    assert all(
        torch.equal(a, b) and len(a) == len(batch.images) and a.isfinite().all()
        for a, b in zip(first, again, strict=True)
    )
    assert images.shape == batch.images.shape and images.isfinite().all() and loss.shape == () and loss.isfinite()


@shapes
def test_rows_of_a_batch_do_not_see_each_other(shape):
    model = build(shape)
    batch = batch_for(model)
    with torch.no_grad():
        for a, b in zip(
            *(
                embed(model, dataclasses.replace(batch, images=batch.images[:n], view=batch.view.rows(0, n)))
                for n in (2, 5)
            ),
            strict=True,
        ):
            torch.testing.assert_close(a, b[:2], atol=1e-5, rtol=1e-5)


@shapes
@pytest.mark.parametrize(
    "kind, size", [("centre", 0.5), ("outpaint", 0.5), ("random", 0.75), ("box", 0.3), ("brush", 0.4)]
)
def test_visible_pixels_stay_to_the_bit_and_hidden_ones_are_never_copied(shape, kind, size):
    model = build(shape)
    batch = batch_for(model, kind=kind, size=size)
    mask = batch.view.pixel_mask(batch.images.shape[-1]).expand_as(batch.images)
    with torch.no_grad():
        images = model.reconstruct(batch.images, batch.view)
        hidden_changed = torch.where(mask, torch.zeros_like(batch.images), batch.images)
        assert torch.equal(images[~mask], batch.images[~mask])
        assert torch.equal(images, model.reconstruct(hidden_changed, batch.view))


@shapes
def test_normalise_and_denormalise_are_inverse(shape):
    model = build(shape)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal((model.denormalise(model.normalise(pixels)) * 255).round().byte(), pixels)
    assert model.denormalise(torch.full((1, 3, 2, 2), 99.0)).max() == 1


@shapes
def test_encoder_and_decoder_share_nothing_and_are_the_whole_model(shape):
    model = build(shape)
    parts = [m for m in (model.encoder, model.decoder, model.shared, model.first_stage) if m is not None]
    owned = [{id(t) for t in (*m.parameters(), *m.buffers())} for m in parts]
    assert all(owned[:2]) and len(set().union(*owned)) == sum(map(len, owned))
    assert {id(p) for p in model.parameters()} == set().union(*({id(p) for p in m.parameters()} for m in parts))
    assert all(p.requires_grad for p in model.encoder.parameters())
    batch = batch_for(model)
    before = embed(model, batch)
    model.drop_decoder()
    after = embed(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {n.split(".")[0] for n in model.state_dict()} <= {"encoder", "shared", "first_stage"}


@shapes
def test_the_seed_alone_decides_what_is_random(shape):
    model = build(shape)
    batch = batch_for(model)
    with torch.no_grad():
        torch.manual_seed(1)
        first, state = embed(model, batch, 7), torch.get_rng_state()
        torch.manual_seed(2)
        again = embed(model, batch, 7)
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@shapes
def test_no_dropout_in_training_mode(shape):
    model = build(shape)
    batch = batch_for(model)
    with torch.no_grad():
        for a, b in zip(*(embed(m, batch) for m in (model, copy.deepcopy(model).train())), strict=True):
            assert torch.equal(a, b)


@shapes
def test_activation_checkpointing_changes_no_gradient_and_keeps_less_in_memory(shape):
    model = build(shape)
    batch = cached(model, batch_for(model))
    kept, gradients = {}, {}
    for active in (False, True):
        model.encoder.activation_checkpointing = active
        model.zero_grad()
        kept[active] = 0

        def keep(tensor, active=active):
            kept[active] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sum(level.square().mean() for level in levels(model.encode(batch.images, batch.view))).backward(
                inputs=list(model.encoder.parameters())
            )
        gradients[active] = [p.grad for p in model.encoder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True], strict=True))
    assert kept[True] < 0.9 * kept[False]


# (sha256 of the names of all tensors, sum of all absolute values) of a model built from seed 3.
FROM_SEED = {
    ("mae", "vit_nano_patch4_32"): ("81ffec3e3b50", 93832.49259559822),
    ("mage", "mage_nano_32"): ("4922a85dd0c2", 43094.37486920485),
    ("migan", "migan_nano_32"): ("8aa1e39f598d", 13923.754365434414),
    ("diffusion", "unet_nano_32"): ("995b58fc45c2", 30355.539627542046),
    ("diffusion", "latent_micro_64"): ("d526a1c28e9d", 140583.30487889287),
    ("diffusion", "flux_micro_128"): ("10190026ff3c", 156461.71752659016),
}


@pytest.mark.parametrize("family, variant", FROM_SEED)
def test_a_seed_gives_the_names_and_weights_that_it_has_always_given(family, variant):
    """Or runs could not be repeated with a later version. The last bits depend on the processor."""
    tensors = weights.build(config.Model(family=family, variant=variant), seed=3).state_dict()
    names, total = FROM_SEED[family, variant]
    assert hashlib.sha256("\n".join(tensors).encode()).hexdigest()[:12] == names
    assert float(sum(t.double().abs().sum() for t in tensors.values())) == pytest.approx(total, rel=1e-7)


@shapes
def test_saved_and_loaded_it_is_the_same_model(shape, tmp_path):
    model = build(shape)
    weights.write(model, str(tmp_path), {})
    back = weights.build(config.Model(family=model.family, weights=str(tmp_path)))
    assert back.options == model.options and back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())
    # also what is in no file: buffers that are computed, and what may be trained
    assert all(torch.equal(t, dict(back.named_buffers())[n]) for n, t in model.named_buffers())
    assert [(n, p.requires_grad, p.dtype) for n, p in back.named_parameters()] == [
        (n, p.requires_grad, p.dtype) for n, p in model.named_parameters()
    ]
    assert not any(t.is_meta for t in (*back.parameters(), *back.buffers()))


@shapes
@pytest.mark.parametrize("kind, size", [("centre", 0.5), ("random", 0.75)])
def test_flops_are_those_that_torch_counts(shape, kind, size):
    model = build(shape)
    batch = cached(model, batch_for(model, kind=kind, size=size))
    # torch counts the products of attention only where they are plain ones.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(batch.images, batch.view)
    assert model.flops(batch.view) * len(batch.images) == pytest.approx(counter.get_total_flops(), rel=0.05)


@shapes
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_says_and_nothing_else(shape, name):
    student, teacher = build(shape, 1), build(shape, 2)
    method, batch = method_for(student, name), batch_for(student)
    if not method.trains_first_stage:
        batch = cached(student, batch)
        method.prepare(batch.images)
    teacher.take_first_stage(torch.device("cpu"))
    if not method.needs_decoder:
        student.drop_decoder()
        teacher.drop_decoder()
    before = {
        n: t.clone()
        for n, t in (*student.state_dict().items(), *((f"teacher {n}", t) for n, t in teacher.state_dict().items()))
    }
    trained = {id(p) for p in method.trainable(student)}
    parts = runs.losses(method, batch, student, teacher if method.needs_teacher else None)
    assert parts["loss"].shape == () and parts["loss"].requires_grad and len(parts) > 1
    terms = [p for n, p in parts.items() if n != "loss"]
    assert all(p.requires_grad == method.gradients_apart and p.isfinite() and p.shape == () for p in terms)
    parts["loss"].backward()
    moved = {id(p) for p in student.parameters() if p.grad is not None and p.grad.any()}
    assert moved and moved <= trained and all(p.grad is None for p in teacher.parameters())
    after = {**student.state_dict(), **{f"teacher {n}": t for n, t in teacher.state_dict().items()}}
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    again = runs.losses(method, batch, student, teacher if method.needs_teacher else None)
    assert torch.equal(parts["loss"], again["loss"])


@shapes
def test_the_papers_method_leaves_the_decoder_alone(shape):
    method, student = runs.method(), build(shape, 1)
    runs.losses(method, cached(student, batch_for(student)), student, build(shape, 2))["loss"].backward()
    assert all(p.grad is not None for p in student.encoder.parameters())
    assert all(
        p.grad is None for part in (student.decoder, student.shared) if part is not None for p in part.parameters()
    )


def test_every_family_has_a_small_shape():
    assert {family for family, _ in SMALL.values()} >= set(MODELS)


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

        def encode(self, images, view, seed=0):
            skip = self.encoder(torch.where(view.pixel_mask(images.shape[-1]), 0, images))
            return [skip, skip.mean((2, 3))]

        def reconstruct(self, images, view):
            filled = self.decoder(self.encode(images, view)[0]).repeat_interleave(4, 2).repeat_interleave(4, 3)
            return torch.where(view.pixel_mask(images.shape[-1]), filled, images)

        def training_loss(self, images, view, seed=0):
            return (self.reconstruct(images, view) - images).square().mean()

        def flops(self, view):
            return 2 * 16 * 5 * 48
    """


def test_a_new_family_is_one_file_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "toy_family.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(MODELS, "entries", dict(MODELS.entries))
    monkeypatch.setitem(SMALL, "toy", ("toy", {"image_size": 16}))
    MODELS.register("toy", "toy_family:Toy")
    assert weights.build(config.Model(family="toy", variant="small")).options.image_size == 16
    for name in ("encoder_l2", "pretrain"):
        test_a_method_trains_what_it_says_and_nothing_else("toy", name)
    with pytest.raises(ConfigError, match="family toy does not say what its decoder predicts"):
        runs.method("max_loss").check(base.adapter("toy"))
    test_saved_and_loaded_it_is_the_same_model("toy", tmp_path / "saved")
    test_flops_are_those_that_torch_counts("toy", "centre", 0.5)
    with pytest.raises(ConfigError, match="toy is registered already, at toy_family:Toy"):
        MODELS.register("toy", "elsewhere:Toy")


def test_a_method_twice_and_a_method_unknown_are_errors():
    with pytest.raises(ConfigError, match="encoder_l2 is registered already"):
        METHODS.register("encoder_l2", "elsewhere:Method")
    with pytest.raises(ConfigError, match="no method 'magic'; known: encoder_l2"):
        methods.method_class("magic")
