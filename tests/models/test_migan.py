"""MI-GAN against an implementation of its own, written plainly from the public layout, and against the public model."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from unlearn import config, views
from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, migan, weights

SMALL = {"image_size": 32, "resolution": 32, "channel_base": 128, "channel_max": 16, "grid": 4}
SHARED = Path(os.environ.get("UNLEARN_SHARED", Path(__file__).parents[2] / "../shared/data")) / "weights"


def act(x):
    return torch.clamp(torch.where(x > 0, x, 0.2 * x) * 2**0.5, -256, 256)


def fir(x, gain=1.0):
    """(B, C, H, W) to (B, C, H - 3, W - 3): every channel through (1, 3, 3, 1) in both directions, by shifted sums."""
    for dim in (2, 3):
        size = x.shape[dim] - 3
        x = sum(weight / 8 * x.narrow(dim, start, size) for start, weight in enumerate((1, 3, 3, 1)))
    return x * gain


def up(x):
    stuffed = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    stuffed[:, :, ::2, ::2] = x
    return fir(F.pad(stuffed, (2, 1, 2, 1)), 4)


def separable(w, name, x, down=False, rise=False):
    x = act(F.conv2d(x, w[f"{name}.conv1.weight"], w[f"{name}.conv1.bias"], padding=1, groups=x.shape[1]))
    x = fir(F.pad(x, (1, 1, 1, 1)))[:, :, ::2, ::2] if down else x
    x = F.conv2d(x, w[f"{name}.conv2.weight"])
    x = up(x) if rise else x
    if f"{name}.noise_const" in w:
        x = x + w[f"{name}.noise_const"][: x.shape[2], : x.shape[3]] * w[f"{name}.noise_strength"]
    return act(x)


def reference(w: dict[str, torch.Tensor], images, hidden, resolution=32):
    """(levels, filled images) of normalised images; w: tensors by their public names; hidden: (B, 1, S, S) bool."""
    known = (~hidden).to(images.dtype)
    x = torch.cat([known - 0.5, images * known], 1)
    x = act(F.conv2d(x, w[f"encoder.b{resolution}.fromrgb.weight"], w[f"encoder.b{resolution}.fromrgb.bias"]))
    skips, names, rgb = [], [resolution >> i for i in range(10) if resolution >> i >= 4], None
    for r in names:
        skips.append(separable(w, f"encoder.b{r}.conv1", x))
        x = separable(w, f"encoder.b{r}.conv2", skips[-1], down=r > 4)
    levels = [x, *skips]
    for r, skip in zip(reversed(names), reversed(skips), strict=True):
        x = separable(w, f"synthesis.b{r}.conv1", x, rise=r > 4) + skip
        x = separable(w, f"synthesis.b{r}.conv2", x)
        seen = F.conv2d(x, w[f"synthesis.b{r}.torgb.weight"], w[f"synthesis.b{r}.torgb.bias"])
        rgb = seen if rgb is None else up(rgb) + seen
    return levels, rgb


@pytest.fixture(scope="module")
def public() -> dict[str, torch.Tensor]:
    """Random weights by their public names, the strengths of the noise among them."""
    generator = torch.Generator().manual_seed(0)
    held = migan.MIGAN(migan.MIGANOptions(**SMALL)).state_dict()
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.4 for n, t in held.items()}
    return {f"synthesis.{n.removeprefix('decoder.')}" if n.startswith("decoder.") else n: t for n, t in tensors.items()}


@pytest.fixture
def loaded(public, tmp_path):
    """make(image_size) -> the same weights in our model, by way of a file as the public ones are."""
    save_file(public, tmp_path / "migan.safetensors")
    model = config.Model(family="migan", weights=str(tmp_path / "migan.safetensors"), options=SMALL)
    return lambda size=32: weights.build(model.model_copy(update={"options": SMALL | {"image_size": size}}))


def batch(size: int, kind="centre", share=0.5, grid=4, rows=2, dtype=torch.float32):
    images = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return images, views.draw([config.ViewSpec(kind=kind, size=share)], grid, rows, np.random.default_rng(0))


@pytest.mark.parametrize("size", [32, 16, 8])
@pytest.mark.parametrize("kind", ["centre", "random"])
def test_levels_and_pixels_of_public_weights_are_those_of_the_plain_model(public, loaded, size, kind):
    images, view = batch(size, kind, dtype=torch.float64)
    hidden = view.pixel_mask(size)
    levels, rgb = reference({n: t.double() for n, t in public.items()}, images, hidden)
    for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = loaded(size).to(dtype)
        with torch.no_grad():
            found, filled = model.encode(images.to(dtype), view), model.reconstruct(images.to(dtype), view)
            loss = model.training_loss(images.to(dtype), view)
        for level, expected in zip(found, levels, strict=True):
            torch.testing.assert_close(level.double(), expected, atol=close, rtol=close)
        expected = torch.where(hidden, rgb, images)
        torch.testing.assert_close(filled.double(), expected, atol=close, rtol=close)
        assert float(loss) == pytest.approx(float((expected - images).abs()[hidden.expand_as(images)].mean()), rel=1e-4)
    assert [len(levels), levels[0].shape[-1]] == [5, size // 8] and rgb.shape == images.shape


@pytest.mark.skipif(
    not (SHARED / "migan_reference_128.npz").exists(), reason="the public weights are not here: set UNLEARN_SHARED"
)
def test_the_public_model_gives_the_reference():
    expected = {n: torch.from_numpy(t) for n, t in np.load(SHARED / "migan_reference_128.npz").items()}
    file = str(SHARED / "migan_512_places2.safetensors")
    model = weights.build(config.Model(family="migan", variant="migan_128", weights=file))
    mask, images = expected["input"][:, :1], expected["input"][:, 1:]
    centre = views.draw([config.ViewSpec(size=0.5)], 16, 1, np.random.default_rng(0))
    assert torch.equal(mask < 0, centre.pixel_mask(128))
    with torch.no_grad():
        levels = model.encode(images, centre)
        filled = model.decoder(levels)
    names = ["bottleneck", *(f"feature_{r}" for r in (512, 256, 128, 64, 32, 16, 8, 4))]
    for name, found in zip([*names, "output"], [*levels, filled], strict=True):
        torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=0, msg=name)


def test_the_activation_and_its_gradient():
    x = torch.tensor([-3e3, -2.0, -1e-3, 1e-3, 2.0, 3e3], dtype=torch.float64, requires_grad=True)
    y = migan.activate(x)
    y.sum().backward()
    gain = 2**0.5
    torch.testing.assert_close(y.detach(), act(x.detach()))
    torch.testing.assert_close(x.grad, torch.tensor([0, 0.2, 0.2, 1, 1, 0], dtype=torch.float64) * gain)


def test_training_goes_on_after_something_was_measured(loaded):
    migan._fir.cache_clear()
    model, (images, view) = loaded(), batch(32)
    with torch.inference_mode():
        model.reconstruct(images, view)
    model.training_loss(images, view).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_in_the_hole_never_enters(loaded):
    model, (images, view) = loaded(), batch(32, "box")
    other = images.masked_fill(view.pixel_mask(32), float("nan"))
    with torch.no_grad():
        for a, b in zip(model.encode(images, view), model.encode(other, view), strict=True):
            assert torch.equal(a, b)


def test_checkpointed_activations_give_the_same_gradients(loaded):
    model, (images, view), found = loaded(), batch(32), []
    for model.encoder.activation_checkpointing in (False, True):
        model.zero_grad()
        sum(level.square().mean() for level in model.encode(images, view)).backward()
        found.append([p.grad.clone() for p in model.encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bf16_weights_beside_buffers_of_float32(loaded):
    """As DeepSpeed leaves them, and as autocast does."""
    model, (images, view) = loaded(), batch(32)
    with torch.no_grad():
        exact = model.reconstruct(images, view)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.reconstruct(images, view)
        for p in model.parameters():
            p.data = p.data.bfloat16()
        half = model.reconstruct(images.bfloat16(), view)
    assert half.dtype == torch.bfloat16 and cast.dtype == torch.float32
    for found in (cast, half.float()):
        assert (found - exact).square().mean() < 1e-3 * exact.square().mean()


def test_it_is_written_back_in_the_public_layout(public, loaded, tmp_path):
    line = loaded(16).to_folder(tmp_path)
    back = load_file(tmp_path / migan.PUBLIC_FILE)
    assert back.keys() == public.keys() and all(torch.equal(t, public[n]) for n, t in back.items())
    assert line == "Generator(32).load_state_dict(torch.load(FOLDER + '/migan.pt'))"


def test_the_file_of_its_own_code_holds_the_constants_of_resampling(public, loaded, tmp_path):
    """By the modules of lib/model_zoo/migan_inference.py: `filter` and `insert_zeros` inside `upsample`,
    `downsample`."""
    loaded(16).to_folder(tmp_path)
    whole = torch.load(tmp_path / migan.WHOLE_FILE, weights_only=True)
    constants = {n: t for n, t in whole.items() if n not in public}
    ups, downs = [n for n in constants if ".upsample." in n], [n for n in constants if ".downsample." in n]
    # Resolutions 32, 16, 8 go down; 8, 16, 32 go up, the image beside the features, each by two constants.
    assert len(downs) == 3 and len(ups) == 3 * 2 * 2 and len(constants) == 15
    low_pass = torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])) / 64
    assert torch.equal(whole["encoder.b32.conv2.downsample.filter.weight"], low_pass.expand(4, 1, 4, 4))
    assert torch.equal(whole["synthesis.b8.upsample.filter.weight"], 4 * low_pass.expand(3, 1, 4, 4))
    again = weights.build(config.Model(family="migan", weights=str(tmp_path / migan.WHOLE_FILE), options=SMALL))
    assert all(torch.equal(t, loaded(32).state_dict()[n]) for n, t in again.state_dict().items())
    torch.save(whole | {"encoder.b32.conv2.downsample.filter": low_pass}, tmp_path / "buffers.pt")
    weights.build(config.Model(family="migan", weights=str(tmp_path / "buffers.pt"), options=SMALL))
    for other in (torch.ones(4, 1, 4, 4), 2 * whole["encoder.b32.conv2.downsample.filter.weight"]):
        torch.save(whole | {"encoder.b32.conv2.downsample.filter.weight": other}, tmp_path / "other.pt")
        with pytest.raises(WeightsError, match="downsample.filter.weight is another filter than MI-GAN's"):
            weights.build(config.Model(family="migan", weights=str(tmp_path / "other.pt"), options=SMALL))


def test_a_file_tells_its_resolution_and_its_widths(public, loaded, tmp_path):
    save_file(public, tmp_path / "migan.safetensors")
    model = config.Model(family="migan", weights=str(tmp_path / "migan.safetensors"), options={"grid": 4})
    found, expected = weights.build(model), loaded(32)
    assert found.options.model_copy(update={"channel_max": 16}) == expected.options
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in found.state_dict().items())
    with pytest.raises(ConfigError, match="image_size 128 must be the resolution 32, half or a quarter of it"):
        weights.build(model.model_copy(update={"variant": "migan_128", "options": {}}))
    lacking = {n: t for n, t in public.items() if n != "encoder.b16.conv1.conv1.bias"}
    save_file(lacking, tmp_path / "migan.safetensors")
    with pytest.raises(WeightsError, match="missing encoder.b16.conv1.conv1.bias"):
        weights.build(model)


@pytest.mark.parametrize("options, message", [
    ({"resolution": 48, "image_size": 48}, "resolution 48 must be a power of two"),
    ({"image_size": 64}, "image_size 64 must be the resolution 512, half or a quarter of it"),
    ({"grid": 24}, "image_size 512 is not a multiple of grid 24"),
    ({"channel_base": 256}, "channel_base 256 leaves block b512 no channel"),
])  # fmt: skip
def test_a_shape_that_cannot_be_is_one_message(options, message):
    with pytest.raises(ConfigError, match=message):
        base.options(config.Model(family="migan", options=options))


def test_a_fresh_model_keeps_the_variance_and_has_no_noise():
    model = weights.build(config.Model(family="migan", variant="migan_nano_32"), seed=3)
    images, view = batch(32, grid=8, rows=8)
    with torch.no_grad():
        levels, filled = model.encode(images, view), model.decoder(model.encode(images, view))
    assert all(0.1 < level.std() < 10 for level in (*levels, filled))
    assert all(not t.any() for n, t in model.state_dict().items() if n.endswith("noise_strength"))
    assert not any("fir" in n or "filter" in n for n in model.state_dict())
