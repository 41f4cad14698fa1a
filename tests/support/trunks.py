"""The convolutions of AlexNet and VGG16, and random weights of them, for LPIPS."""

import torch

# (output channels, side, stride, padding) of a convolution with its activation; a number is the side of a pooling of
# stride 2; None: what is before it is compared.
ALEX = [
    (64, 11, 4, 2),
    None,
    3,
    (192, 5, 1, 2),
    None,
    3,
    (384, 3, 1, 1),
    None,
    (256, 3, 1, 1),
    None,
    (256, 3, 1, 1),
    None,
]
_WIDTHS = (64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3
VGG = [step for widths in _WIDTHS for step in (*((w, 3, 1, 1) for w in widths), None, 2)][:-1]


def trunk(layers: list, places: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random weights by the names of torchvision."""
    generator, before, tensors = torch.Generator().manual_seed(1), 3, {}
    for place, layer in zip(places, [x for x in layers if isinstance(x, tuple)], strict=True):
        width, side = layer[:2]
        scale = (2 / (before * side * side)) ** 0.5
        tensors[f"features.{place}.weight"] = scale * torch.randn(width, before, side, side, generator=generator)
        tensors[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
        before = width
    return tensors
