"""What the teacher made of micro-batches, kept in host memory from one run to the next.

A target is a function of the micro-batch, which its seed names, and of the run's recipe: the seed, the sets, the views,
the original, and what the method shows the teacher; never of alpha. The host knows both, so a GPU is not waited for:
its targets go to page-locked memory and come back by copies that are queued behind the work they follow.
"""

import hashlib
import json
from collections.abc import Callable, Hashable

import torch

from unlearn.methods import base as methods
from unlearn.models.base import Embedding
from unlearn.run import Run

# Bytes of memory that are asked for at once: page-locked memory is slow to come by, and torch rounds it to powers of 2.
CHUNK = 64 << 20
ALIGNED = 256  # bytes, as a GPU's copies like it
# In so many runs a recipe may be asked for again; older ones make room.
RUNS = 8


def recipe(run: Run, device: torch.device) -> str:
    """What the targets of a run depend on besides the micro-batch, as a digest."""
    settings, method = run.settings, methods.method_class(run.settings.method.name)
    training = settings.training
    shown = settings.method.model_dump(mode="json", exclude=set(method.loss_options))
    about = [
        shown, settings.seed, settings.data.model_dump(mode="json"), settings.model.model_dump(mode="json"),
        run.origin, settings.micro_batch, training.forget_fraction, repr(settings.train_views),
        training.engine, training.zero_stage, training.dtype, training.threads, str(device),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(run.sets):
        digest.update(name.encode() + run.sets[name].rows.tobytes())
    return digest.hexdigest()


class Targets:
    """The targets of several recipes, within a limit in bytes. Micro-batches come again in the same order, so what
    there is no room for is not kept, rather than that it takes the place of what will be asked for sooner."""

    def __init__(self, limit: int):
        self.limit, self._run = limit, 0
        self._recipes: dict[str, _Recipe] = {}
        self._current = _Recipe()

    @property
    def bytes(self) -> int:
        """Bytes of memory that are taken now."""
        return sum(len(chunk) for each in self._recipes.values() for chunk in each.chunks)

    def begin(self, recipe: str) -> None:
        """A run of this recipe begins: what is asked for from now on belongs to it."""
        self._run += 1
        self._current = self._recipes.setdefault(recipe, _Recipe())
        self._current.run = self._run

    def get(self, name: Hashable, device: torch.device, compute: Callable[[], Embedding]) -> Embedding:
        """What `compute` has given for this name, on the device, equal to the bit and laid out alike; nobody may write
        into it."""
        if (held := self._current.held.get(name)) is None:
            made = compute()
            levels = [made] if isinstance(made, torch.Tensor) else made
            if self._make_room(sum(map(_bytes, levels)), device):
                self._current.held[name] = [self._current.copy(level) for level in levels], isinstance(made, list)
            return made
        levels, several = held
        levels = [level.to(device, non_blocking=True) for level in levels]
        return levels if several else levels[0]

    def _make_room(self, size: int, device: torch.device) -> bool:
        """See that the current recipe has a chunk with so many bytes left, where the limit allows it."""
        current = self._current
        if current.chunks and current.used + size <= len(current.chunks[-1]):
            return True
        size = max(_power_of_two(size), min(CHUNK, _power_of_two(self.limit // 8)))
        for name, old in sorted(self._recipes.items(), key=lambda item: item[1].run):
            if self.bytes + size > self.limit and old.run <= self._run - RUNS:
                del self._recipes[name]
        if self.bytes + size > self.limit:
            return False
        current.chunks.append(torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda"))
        current.used = 0
        return True


class _Recipe:
    """held: name -> (its tensors, whether they came as a list), in `chunks`, of whose last `used` bytes are taken."""

    def __init__(self):
        self.held: dict[Hashable, tuple[list[torch.Tensor], bool]] = {}
        self.chunks: list[torch.Tensor] = []
        self.used = self.run = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the last chunk; other strides could make sums over it round otherwise."""
        flat = self.chunks[-1][self.used : self.used + tensor.numel() * tensor.itemsize].view(tensor.dtype)
        self.used += _bytes(tensor)
        strides = torch.empty_like(tensor, device="meta").stride()
        return flat.as_strided(tensor.shape, strides).copy_(tensor, non_blocking=True)


def _bytes(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.itemsize // ALIGNED) * ALIGNED


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
