"""The corruption T: which patches of an image's grid are hidden.

All views of one micro-batch hide the same number of patches, so every tensor has a fixed shape.
"""

from dataclasses import dataclass

import numpy as np
import torch

from unlearn import config


@dataclass(frozen=True)
class View:
    """What T leaves of a batch.

    visible: (B, V) long, indices of the patches that stay, ascending; hidden: (B, G*G - V) long; grid: G.
    """

    visible: torch.Tensor
    hidden: torch.Tensor
    grid: int

    def pin(self) -> "View":
        return View(self.visible.pin_memory(), self.hidden.pin_memory(), self.grid)

    def to(self, device) -> "View":
        return View(self.visible.to(device, non_blocking=True), self.hidden.to(device, non_blocking=True), self.grid)

    def rows(self, start: int, stop: int) -> "View":
        """The views of rows start..stop of the batch."""
        return View(self.visible[start:stop], self.hidden[start:stop], self.grid)

    def pixel_mask(self, size: int) -> torch.Tensor:
        """(B, 1, size, size) bool, true where hidden."""
        mask = torch.zeros(len(self.visible), self.grid**2, dtype=torch.bool, device=self.visible.device)
        mask.scatter_(1, self.hidden, True)
        patch = size // self.grid
        mask = mask.view(-1, 1, self.grid, self.grid)
        return mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def draw(specs: list[config.ViewSpec], grid: int, count: int, rng: np.random.Generator) -> View:
    """Draw one of the specs, and `count` views of it. The same generator state gives the same views."""
    spec = specs[int(rng.integers(len(specs)))]
    low, high = spec.size if isinstance(spec.size, tuple) else (spec.size, spec.size)
    mask = _DRAW[spec.kind](grid, count, rng.uniform(low, high) if low < high else low, rng)
    # A stable sort of booleans puts the visible (False) first and keeps both runs ascending.
    order = np.argsort(mask, axis=1, kind="stable")
    visible = grid * grid - int(mask[0].sum())
    return View(torch.from_numpy(order[:, :visible].copy()), torch.from_numpy(order[:, visible:].copy()), grid)


def repeated(view: View, count: int) -> View:
    """The same view for `count` rows; `view` has one."""
    # Copied: rows that share their memory cannot be pinned.
    return View(view.visible.repeat(count, 1), view.hidden.repeat(count, 1), view.grid)


def fullest(specs: list[config.ViewSpec], grid: int, count: int, rng: np.random.Generator) -> View:
    """Of all views that the specs allow the one that hides least: it takes the most memory and time."""
    sizes = [(spec, size) for spec in specs for size in (spec.size if isinstance(spec.size, tuple) else (spec.size,))]
    drawn = [draw([spec.model_copy(update={"size": size})], grid, count, rng) for spec, size in sizes]
    return max(drawn, key=lambda view: view.visible.shape[1])


def _side(grid: int, size: float) -> int:
    return min(max(round(grid * size), 1), grid - 1)


def _centre(grid, count, size, rng):
    side = _side(grid, size)
    start = (grid - side) // 2
    mask = np.zeros((count, grid, grid), bool)
    mask[:, start : start + side, start : start + side] = True
    return mask.reshape(count, -1)


def _outpaint(grid, count, size, rng):
    return ~_centre(grid, count, size, rng)


def _random(grid, count, size, rng):
    hidden = min(max(round(grid * grid * size), 1), grid * grid - 1)
    order = np.argsort(rng.random((count, grid * grid)), axis=1)
    mask = np.zeros((count, grid * grid), bool)
    np.put_along_axis(mask, order[:, :hidden], True, axis=1)
    return mask


def _box(grid, count, size, rng):
    side = _side(grid, size)
    top, left = rng.integers(0, grid - side + 1, (2, count, 1, 1))
    y, x = np.arange(grid)[None, :, None], np.arange(grid)[None, None, :]
    return ((y >= top) & (y < top + side) & (x >= left) & (x < left + side)).reshape(count, -1)


def _brush(grid, count, size, rng):
    """Random walks of a one-patch brush until exactly the wanted share is hidden."""
    hidden = min(max(round(grid * grid * size), 1), grid * grid - 1)
    mask = np.zeros((count, grid, grid), bool)
    steps = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
    for row in mask:
        covered = 0
        while covered < hidden:
            y, x = rng.integers(0, grid, 2)
            direction = int(rng.integers(4))
            for _ in range(int(rng.integers(grid // 2, 2 * grid + 1))):
                covered += not row[y, x]
                row[y, x] = True
                if covered == hidden:
                    break
                if rng.random() < 0.3:
                    direction = int(rng.integers(4))
                y, x = np.clip((y, x) + steps[direction], 0, grid - 1)
    return mask.reshape(count, -1)


_DRAW = {"centre": _centre, "outpaint": _outpaint, "random": _random, "box": _box, "brush": _brush}
