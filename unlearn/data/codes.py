"""What a frozen front end (tokenizer, VAE) makes of images, computed once and kept: then training needs neither of them.

A front's output depends on the view too, so a run with `data.codes` draws `data.code_views` views once, from its
`train_views` and no seed, and keeps the codes of every row under each. One file holds the chosen rows of one row group; its
name says what is in it, so files are never changed, and runs share them.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from unlearn import config, views
from unlearn.data import order
from unlearn.data.loader import Images, fit
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage
from unlearn.errors import DataError
from unlearn.models.base import Adapter

BATCH = 16  # images that go through the front at once


class Codes:
    """Codes of one RowSet in the folder `run.data.codes`. front: the model's, `model` has its shape and normalisation."""

    def __init__(self, run: config.RunConfig, rows: RowSet, model: Adapter, front: torch.nn.Module):
        self.run, self.set = run, rows
        self.model, self.front, self.size = model, front, model.options.image_size
        specs = [spec.model_dump(mode="json") for spec in run.train_views]
        told = {
            "data": rows.manifest.hash, "front": _fingerprint(front), "grid": model.grid,
            "images": model.options.model_dump(mode="json", include={"image_size", "mean", "std"}),
            "views": specs, "count": run.data.code_views,
        }  # fmt: skip
        self.storage = Storage(f"{run.data.codes}/{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}")
        self.views = [views.draw(run.train_views, model.grid, 1, order.generator(1 << 24, n)) for n in range(run.data.code_views)]
        self._files = {int(group): self._file(int(group)) for group in np.unique(rows.groups)}
        self.images = Images(rows, run.data)  # counts the damaged ones
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def _rows(self, group: int) -> np.ndarray:
        return self.set.rows[np.searchsorted(self.set.groups, group) : np.searchsorted(self.set.groups, group, side="right")]

    def _file(self, group: int) -> str:
        return f"{group:06d}-{hashlib.sha256(self._rows(group).tobytes()).hexdigest()[:16]}.safetensors"

    def fill(self, device: torch.device, rank: int, workers: int, progress: Callable[[int, int], None]) -> None:
        """Make what is missing of this worker's share. Raises DataError as the loader does on damaged images."""
        there = set(self.storage.files())
        # Shared before looking: a worker that looks later finds other files there.
        missing = [group for group, name in list(self._files.items())[rank::workers] if name not in there]
        images = Images(self.set, self.run.data)
        for done, group in enumerate(missing):
            rows = self._rows(group)
            held = {"codes": self._make(images, rows, device)}
            held["bad"] = torch.tensor([row for row in rows.tolist() if row in images.bad], dtype=torch.int64)
            self.storage.write(self._files[group], save(held))
            progress(done + 1, len(missing))

    def _make(self, images: Images, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """(rows, views, ...): int16 where the codes are small whole numbers, else float16."""
        parts = []
        with ThreadPoolExecutor(self.run.data.decode_threads) as pool:
            for start in range(0, len(rows), BATCH):
                pixels = list(pool.map(lambda row: fit(images.sound(row), self.size), rows[start : start + BATCH].tolist()))
                found = self.model.normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device))
                with torch.no_grad():
                    made = [self.front(found, views.repeated(view, len(pixels)).to(device)).cpu() for view in self.views]
                parts.append(torch.stack(made, dim=1))
        codes = torch.cat(parts)
        if codes.is_floating_point():
            return codes.half()
        return codes.to(torch.int16 if int(codes.max()) < 1 << 15 else torch.int32)

    def __call__(self, row: int, view: int) -> torch.Tensor:
        """The code of a row under one of `views`. Raises DataError where it was not made."""
        group = int(np.searchsorted(self.set.manifest.starts, row, side="right") - 1)
        place = int(np.searchsorted(self._rows(group), row))
        return self._group(group)[place, view]

    def _group(self, group: int) -> torch.Tensor:
        with self._lock:
            if group not in self._kept:
                name = self._files[group]
                try:
                    held = load(self.storage.read(name))
                    self._kept[group], bad = held["codes"], held["bad"].tolist()
                except (SafetensorError, KeyError):
                    raise DataError(f"{self.storage.where(name)} is damaged: delete it, and it is made anew") from None
                for row in bad:  # another image stands in for it
                    self.images.skip(row, ValueError("found when their codes were made"))
                while self.run.data.cache == "none" and len(self._kept) > 4:
                    self._kept.popitem(last=False)
            return self._kept[group]

    def forget_front(self) -> None:
        """Let go of the front and the model once everything is made."""
        self.model = self.front = None


def _fingerprint(front: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(front.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
