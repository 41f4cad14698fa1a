"""The networks that look at images: input, output, and what is said when weights are not there."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unlearn.data import shards
from unlearn.data.decode import decode
from unlearn.errors import ConfigError, MissingExtra, UnlearnError, WeightsError
from unlearn.evaluation import features
from unlearn.evaluation.resize import resize


@pytest.fixture(scope="module")
def lite0():
    torch.set_num_threads(1)
    return features.build("efficientnet_lite0")


def images(count=2, size=32, seed=0):
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def test_shapes_and_kinds_of_input(lite0):
    pixels = images()
    found, classes = lite0(pixels)
    assert found.shape == (2, 1280) and classes.shape == (2, 1000)
    assert found.isfinite().all() and found.std() > 0
    torch.testing.assert_close(lite0(pixels.float() / 255)[0], found)


def test_input_is_what_the_network_was_trained_on(lite0):
    seen = []
    handle = lite0.body.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    lite0(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    handle.remove()
    assert seen[0].shape == (1, 3, 224, 224)
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]))  # (255 - 127) / 128


def test_an_image_does_not_depend_on_its_batch(lite0):
    pixels = images(features.CPU_BATCH + 1)
    torch.testing.assert_close(lite0(pixels)[0][-1:], lite0(pixels[-1:])[0], rtol=1e-4, atol=1e-4)


def test_what_is_folded_computes_the_same(lite0):
    """As the network of the package, whose weights are the pinned ones, before anything is folded."""
    from efficientnet_lite_pytorch import EfficientNet

    whole = EfficientNet.from_name("efficientnet-lite0")
    whole.load_state_dict(torch.load(features.file("efficientnet_lite0", None), weights_only=True))
    images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vectors, classes = lite0(images)
        expected = whole.eval()((images - 127 / 255) / (128 / 255))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in lite0.modules())
    assert float((classes - expected).norm() / expected.norm()) < 1e-5
    assert vectors.shape == (3, 1280)


def test_features_tell_kinds_of_pictures_apart(lite0):
    table = (
        shards.load("embedded:fashion-test").read(0, ["image"]).take([0, 1, 2, 3, 100, 101, 102, 103])
    )  # T-shirts, trousers
    pixels = torch.stack([torch.from_numpy(decode(image).copy()).permute(2, 0, 1) for image in shards.images(table)])
    found = F.normalize(lite0(pixels)[0])
    alike = found @ found.T
    assert (alike[:4, :4].mean() + alike[4:, 4:].mean()) / 2 > alike[:4, 4:].mean() + 0.1


def inception_state():
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    return net.eval(), {n: t for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")}


def test_inception_reads_a_state_dict_and_pools_the_way_of_2015(tmp_path):
    plain, state = inception_state()
    torch.save(state, tmp_path / "inception.pth")
    net = features.build("inception", str(tmp_path / "inception.pth"), "clean")
    assert net.resize == "clean" and features.resizing("inception", "clean") == "clean"
    seen = net._prepare(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 299, 299))
    torch.testing.assert_close(seen[0, :, 0, 0], (torch.tensor([0.0, 128, 255]) - 128) / 128, atol=1e-6, rtol=0)
    pixels = images(1, 299)
    found, classes = net(pixels)
    assert found.shape == (1, 2048) and classes.shape == (1, 1008)
    torch.testing.assert_close(classes, found @ state["fc.weight"].T)  # no bias
    # One block against a computation of its own: the pooling branch does not count the padding.
    x = torch.randn(1, 192, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = net.body.Mixed_5b(x), plain.Mixed_5b(x)
        inside = F.conv2d(torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3), padding=1)
        summed = F.conv2d(x, torch.ones(192, 1, 3, 3), padding=1, groups=192)
        pooled = plain.Mixed_5b.branch_pool(summed / inside)
    torch.testing.assert_close(ours[:, :-32], theirs[:, :-32])
    torch.testing.assert_close(ours[:, -32:], pooled)
    assert not torch.allclose(ours[:, -32:], theirs[:, -32:])


def tf1(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's resize_bilinear of (H, W, 3), written from its kernel: pixel by pixel, align_corners false."""
    old, scale = len(image), np.float64(len(image) / size)
    at = [(int(i * scale), min(int(i * scale) + 1, old - 1), i * scale - int(i * scale)) for i in range(size)]
    rows = np.stack([image[low] * (1 - share) + image[high] * share for low, high, share in at])
    return np.stack([rows[:, low] * (1 - share) + rows[:, high] * share for low, high, share in at], axis=1)


def pil(image: np.ndarray, size: int) -> np.ndarray:
    """As clean-fid: PIL's bicubic on each channel in floating point, clipped."""
    channels = (
        Image.fromarray(image[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        for c in range(3)
    )
    return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=2)


@pytest.mark.parametrize("convention, reference", [("tf1", tf1), ("clean", pil)])
@pytest.mark.parametrize("size", [32, 299, 512])
def test_images_get_to_the_size_of_inception_as_the_convention_says(convention, reference, size):
    pixels = images(1, size)
    found = 255 * resize(pixels / 255, 299, convention)[0].permute(1, 2, 0).numpy()
    expected = reference(pixels[0].permute(1, 2, 0).double().numpy(), 299)
    np.testing.assert_allclose(found, expected, atol=0.01)  # of 255
    other = 255 * resize(pixels / 255, 299, "clean" if convention == "tf1" else "tf1")
    assert size == 299 or abs(other[0].permute(1, 2, 0).numpy() - expected).max() > 10  # the comparison can fail


def test_weights_that_are_missing_or_wrong_are_told(tmp_path):
    with pytest.raises(WeightsError, match="features_weights"):
        features.build("inception")
    with pytest.raises(UnlearnError, match="nothing.pth"):
        features.build("inception", str(tmp_path / "nothing.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="other.pth does not hold the weights of inception"):
        features.build("inception", str(tmp_path / "other.pth"))
    with pytest.raises(ConfigError, match="efficientnet_lite0, inception, clip"):
        features.build("resnet")


def test_weights_are_never_unpickled(tmp_path):
    torch.save({"a": print}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match="safe formats only"):
        features.build("inception", str(tmp_path / "code.pth"))


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is not None, reason="open_clip is installed")
def test_clip_without_its_package_says_how_to_get_it():
    with pytest.raises(MissingExtra, match=r"unlearn\[clip\]"):
        features.build("clip")


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
def test_clip_reads_a_state_dict(tmp_path):
    import open_clip

    torch.save(open_clip.create_model("RN50", pretrained=None).state_dict(), tmp_path / "clip.pth")
    net = features.build("clip:RN50", str(tmp_path / "clip.pth"))
    found, classes = net(images(1))
    assert found.shape == (1, 1024) and classes is None
    with pytest.raises(ConfigError, match="no architecture"):
        features.build("clip:nothing", str(tmp_path / "clip.pth"))
