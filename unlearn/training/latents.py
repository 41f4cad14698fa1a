"""The latent cache: what a frozen first stage (tokenizer, VAE) makes of images, computed once and kept in files, so
that training needs neither the first stage nor the images.

A first stage's output depends on the view too, so a run with `data.latent_cache` draws `data.latent_views` views
once, from its `train_views` and no seed, and keeps the latents of every row under each. One file holds the chosen
rows of one row group; its name says what is in it, so files are never changed, and runs share them.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from unlearn import config, views
from unlearn.data import cache, order
from unlearn.data.cache import ImageCache
from unlearn.data.images import Images
from unlearn.data.recent import Recent
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage
from unlearn.errors import DataError
from unlearn.models.base import Adapter
from unlearn.run import Run
from unlearn.training import metrics

BATCH = 16  # images that go through the first stage at once


class LatentCache:
    """The latents of one RowSet, in the folder `settings.data.latent_cache`.

    model: its shape and normalisation count; first_stage: the model's. loaded: the files in memory, shared by the
    sets of a worker.
    """

    def __init__(
        self, settings: config.RunConfig, rows: RowSet, model: Adapter, first_stage: torch.nn.Module,
        loaded: Recent | None = None,
    ):  # fmt: skip
        self.settings, self.set = settings, rows
        # None once they were released.
        self.model: Adapter | None = model
        self.first_stage: torch.nn.Module | None = first_stage
        self.size = model.options.image_size
        specs = [spec.model_dump(mode="json") for spec in settings.train_views]
        told = {
            "data": rows.manifest.hash, "first_stage": _fingerprint(first_stage), "grid": model.grid,
            "images": model.options.model_dump(mode="json", include={"image_size", "mean", "std"}),
            "views": specs, "count": settings.data.latent_views, "orientation": settings.data.orientation,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self.storage = Storage(f"{settings.data.latent_cache}/{digest[:16]}")
        rngs = [order.generator(1 << 24, number) for number in range(settings.data.latent_views)]
        self.views = [views.draw(settings.train_views, model.grid, 1, rng) for rng in rngs]
        self._files = {int(group): self._file(int(group)) for group in rows.touched}
        self._loaded = _recent(settings) if loaded is None else loaded
        self.images = self._images()  # counts the damaged ones

    def _images(self) -> Images:
        """The images without a cache, since each is used once: only the row group being read is in memory."""
        return Images(self.set, self.settings.data.model_copy(update={"cache": "none"}), ImageCache(0), self.size)

    def _rows(self, group: int) -> np.ndarray:
        starts, rows = self.set.manifest.starts, self.set.rows
        start, stop = np.searchsorted(rows, starts[group : group + 2].astype(rows.dtype))
        return rows[start:stop]

    def _file(self, group: int) -> str:
        return f"{group:06d}-{hashlib.sha256(self._rows(group).astype('<i8').tobytes()).hexdigest()[:16]}.safetensors"

    def fill(self, device: torch.device, rank: int, workers: int, progress: Callable[[int, int], None]) -> None:
        """Make what is missing of this worker's share. Raises DataError as the loader does on damaged images."""
        there = set(self.storage.files())
        # Shared out before looking for what is missing: a worker that looks later finds more files there.
        missing = [group for group, name in list(self._files.items())[rank::workers] if name not in there]
        images = self._images()
        for done, group in enumerate(missing):
            rows = self._rows(group)
            tensors = {"latents": self._make(images, rows, device)}
            tensors["bad"] = torch.tensor([row for row in rows.tolist() if row in images.bad], dtype=torch.int64)
            self.storage.write(self._files[group], save(tensors))
            progress(done + 1, len(missing))

    def _make(self, images: Images, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """(rows, views, ...): int16 where the latents are small whole numbers, else float16."""
        model, first_stage, parts = self.model, self.first_stage, []
        assert model is not None and first_stage is not None, "nothing is made after their release"
        with ThreadPoolExecutor(self.settings.data.decode_threads) as pool:
            for start in range(0, len(rows), BATCH):
                pixels = list(pool.map(images.sound, rows[start : start + BATCH].tolist()))
                inputs = model.normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device))
                repeated = [views.repeated(view, len(pixels)).to(device) for view in self.views]
                with torch.no_grad():
                    made = [first_stage(inputs, view).cpu() for view in repeated]
                parts.append(torch.stack(made, dim=1))
        latents = torch.cat(parts)
        if latents.is_floating_point():
            return latents.half()
        return latents.to(torch.int16 if int(latents.max()) < 1 << 15 else torch.int32)

    def __call__(self, row: int, view: int) -> torch.Tensor:
        """The latent of a row under one of `views`. Raises DataError, StorageError on a damaged or missing file."""
        group = int(np.searchsorted(self.set.manifest.starts, row, side="right") - 1)
        place = int(np.searchsorted(self._rows(group), row))
        name = self._files[group]
        # A copy, since a view would keep the whole file in memory until the micro-batch is put together.
        return self._loaded.get(self.storage.where(name), lambda: self._load(name))[place, view].clone()

    def _load(self, name: str) -> tuple[torch.Tensor, int]:
        """(the latents of a file, their bytes). A local file is mapped: it takes memory only as its rows are used,
        and the system may take that back; one on S3 is read whole."""
        if self.storage.is_local() and not self.storage.is_file(name):
            raise DataError(f"{self.storage.where(name)} is gone: start the run again, and it is made anew")
        try:
            tensors = load_file(self.storage.where(name)) if self.storage.is_local() else load(self.storage.read(name))
            latents, bad = tensors["latents"], tensors["bad"].tolist()
        except (SafetensorError, KeyError):
            raise DataError(f"{self.storage.where(name)} is damaged: delete it, and it is made anew") from None
        for row in bad:  # another image stands in for it
            self.images.skip(row, ValueError("found when their latents were made"))
        return latents, latents.nbytes

    def release_first_stage(self) -> None:
        """Let go of the first stage and the model once everything is made."""
        self.model = self.first_stage = None


def _recent(settings: config.RunConfig) -> Recent:
    """Holds the latent files of a worker that were used last: a shuffle window reads from a few, then leaves them."""
    return Recent(cache.limit(settings.data, settings.cluster.workers))


def _fingerprint(first_stage: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(first_stage.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def filled(
    run: Run, student: Adapter, first_stage: torch.nn.Module, device: torch.device, report: Callable[[dict], None]
) -> dict[str, LatentCache]:
    """The latent cache of every set, with what was missing made; the workers share the work.

    report: called with {"latents": row groups done, "of": all of this worker's}.
    """
    together = dist.is_available() and dist.is_initialized()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    loaded = _recent(run.settings)
    caches = {name: LatentCache(run.settings, rows, student, first_stage, loaded) for name, rows in run.sets.items()}

    def told(done: int, of: int) -> None:
        row = {"latents": done, "of": of}
        Storage(run.folder).write(metrics.LATENTS, json.dumps(row).encode())
        if not together:  # Ray's report waits for all workers, who do not have as much to make
            report(row)

    for latents in caches.values():
        latents.fill(device, rank, workers, told if rank == 0 else lambda done, of: None)
    if together:
        dist.barrier()
    for latents in caches.values():
        latents.release_first_stage()
    return caches
