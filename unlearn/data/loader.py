"""Micro-batches by number, made ahead in threads.

Threads, not processes: the decoder releases the GIL. The loader has no state but its caches, since a micro-batch is
a pure function of its number: to go on after a stop is to start at another number.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from unlearn import config, views
from unlearn.data import cache, order, pixels
from unlearn.data.images import Images
from unlearn.data.scaling import crop_flip
from unlearn.data.selection import RowSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. images: (B, 3, S, S) uint8, or (B, ...) latents, from the loader; on the device what the
    encoder takes. Rows [:retain] are the retain set's, the others the forget set's. seed: of everything random in
    this micro-batch. weight: of its loss in the step; 0 where it only keeps its worker in step with the others."""

    images: torch.Tensor
    view: views.View
    retain: int
    seed: int
    weight: float = 1.0

    def pin(self) -> "Batch":
        """In page-locked memory; the images are not copied where they are already."""
        return replace(self, images=self.images.pin_memory(), view=self.view.pin())


class Loader:
    """Micro-batches by number. grid, size: of the model; sets: {"retain": ..., "forget": ...}; latents: the
    LatentCache of each set, where the batches are to hold latents in place of pixels; kept: a cache that holds images
    already."""

    def __init__(
        self, settings: config.RunConfig, sets: dict[str, RowSet], grid: int, size: int, latents: dict | None = None,
        kept: cache.ImageCache | None = None,
    ):  # fmt: skip
        self.settings, self.grid, self.size, self.latents = settings, grid, size, latents
        fraction = settings.training.forget_fraction if "forget" in sets else 0
        self.retain, self.forget = order.split(settings.micro_batch, fraction)
        if latents:
            self.images = {name: latents[name].images for name in sets}
        else:
            pixels.sweep()
            kept = kept or cache.image_cache(settings.data, settings.cluster.workers)
            _warn_of_rereads(sets, settings.data, kept)
            self.images = {
                name: Images(rows, settings.data, kept, cut(settings.data, size)) for name, rows in sets.items()
            }
        self.streams = {
            name: order.Stream(rows.rows, rows.starts, settings.seed, number, settings.data.shuffle_rows)
            for number, (name, rows) in enumerate(sorted(sets.items()))
        }

    @property
    def bad_images(self) -> dict[str, list[str]]:
        """Ids of the damaged images of each set that this worker has met so far."""
        return {name: sorted(images.bad.values()) for name, images in self.images.items() if images.bad}

    def batch(self, number: int, pin: bool = False) -> Batch:
        """Micro-batch `number`, computed in the calling thread; pin: in page-locked memory from the start."""
        rng = order.generator(self.settings.seed, 1 << 20, number)
        if self.latents:
            made = self._of_latents(number, rng)
            return made.pin() if pin else made
        view = views.draw(self.settings.train_views, self.grid, self.retain + self.forget, rng)
        shape = self.retain + self.forget, self.size, self.size, 3
        # numpy's own memory is of large pages, which torch's is not.
        whole = (
            torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            if pin
            else torch.from_numpy(np.empty(shape, np.uint8))
        )
        made, place = whole.numpy(), 0
        for name, rows in self._rows(number):
            part, place = made[place : place + len(rows)], place + len(rows)
            if self.settings.data.augment == "none":
                self.images[name].gather(rows, part)
                continue
            self.images[name].fetch(rows)
            for to, row in zip(part, rows.tolist(), strict=True):
                to[:] = crop_flip(self.images[name].sound(row), self.size, rng)
        # The channels stay last in memory, as decoders give them: no pixel is moved once more.
        images = whole.permute(0, 3, 1, 2)
        return Batch(images, view.pin() if pin else view, self.retain, int(rng.integers(1 << 62)))

    def _of_latents(self, number: int, rng: np.random.Generator) -> Batch:
        assert self.latents, "called only where the batches hold latents"
        which = int(rng.integers(self.settings.data.latent_views))
        latents = torch.stack([self.latents[name](row, which) for name, row in self.rows(number)])
        view = views.repeated(next(iter(self.latents.values())).views[which], len(latents))
        return Batch(latents, view, self.retain, int(rng.integers(1 << 62)))

    def rows(self, number: int) -> list[tuple[str, int]]:
        """(set, row) of every image of micro-batch `number`."""
        return [(name, row) for name, rows in self._rows(number) for row in rows.tolist()]

    def _rows(self, number: int) -> list[tuple[str, np.ndarray]]:
        counts = (("retain", self.retain), ("forget", self.forget))
        return [(name, self.streams[name].take(number * count, count)) for name, count in counts if count]

    def batches(self, numbers: Iterable[int], pin: bool = False) -> Iterator[Batch]:
        """The micro-batches of these numbers in turn, the next ones made in threads meanwhile."""
        with ThreadPoolExecutor(self.settings.data.decode_threads, thread_name_prefix="decode") as pool:
            ahead: deque = deque()
            try:
                for number in numbers:
                    ahead.append(pool.submit(self.batch, number, pin))
                    if len(ahead) > self.settings.data.read_ahead:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


def cut(data: config.Data, size: int) -> int | None:
    """The size in which images are kept: a random crop is another one in every epoch, so it is taken from the whole
    image."""
    return size if data.augment == "none" else None


def _warn_of_rereads(sets: dict[str, RowSet], data: config.Data, kept: cache.ImageCache) -> None:
    """Warn where row groups will be evicted while a shuffle window still needs them: that is right, but slow."""
    stored, used = sum(map(cache.stored_bytes, sets.values())), cache.in_use(sets, data)
    room = kept.limit if data.cache == "none" else (kept.limit - kept.room) // kept.workers
    if used > room and (data.cache == "none" or kept.workers * stored > kept.room):
        log.warning(
            "data.cache_bytes %.3g GiB is little for images of %.3g GiB that are shuffled together: row groups are "
            "read many times in an epoch. Raise it, or lower data.shuffle_rows (now %d), which changes the order of "
            "the images",
            kept.limit / 2**30, stored / 2**30, data.shuffle_rows,
        )  # fmt: skip
