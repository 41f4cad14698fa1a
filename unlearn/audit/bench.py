"""What a worker measures with: the images, one generator at a time, the feature network where a test asks for it.

A worker audits one run after another. Between them it keeps the images and the feature network; nothing of it changes a
result.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from unlearn import config, patience, views
from unlearn.audit.base import Piece
from unlearn.audit.subject import Subject
from unlearn.data import cache, order
from unlearn.data.images import Images
from unlearn.evaluation import measure
from unlearn.evaluation.comparison import Comparison
from unlearn.evaluation.metrics import hole_errors
from unlearn.models.base import Adapter, Embedding

STREAM = 1 << 26  # of the random numbers of an audit: those of views


class Kept:
    """The images and the feature network, from one run to the next."""

    def __init__(self):
        self._images: cache.ImageCache | None = None
        self._network: tuple[str, torch.nn.Module] | None = None

    def images(self, subject: Subject) -> cache.ImageCache:
        """The cache for the images of a subject; another one where its limit is another. What the subject does not need
        is let go where room is short."""
        settings = subject.run.settings
        made = cache.image_cache(settings.data, settings.evaluation.workers or settings.cluster.workers)
        if self._images is None or (self._images.limit, self._images.workers) != (made.limit, made.workers):
            self._images = made
        return self._images

    def make_room(self, subject: Subject, size: int) -> None:
        """Let go of images that this subject does not need, where room is short. size: pixels of an image's side."""
        wanted: dict[Any, np.ndarray] = {}
        for rows in subject.sets.values():
            shelf = Images.shelf(rows, subject.run.settings.data, size)
            wanted[shelf] = np.concatenate([wanted.get(shelf, rows.rows[:0]), rows.rows])
        self.images(subject).make_room(wanted)

    def network(self, subject: Subject) -> torch.nn.Module:
        """The feature network of a run's evaluation."""
        settings, evaluation = subject.run.settings, subject.run.settings.evaluation
        key = repr((evaluation.features, subject.network, evaluation.resize, measure.device(settings)))
        if self._network is None or self._network[0] != key:
            self._network = key, measure.feature_network(settings)
        return self._network[1]


class Benches:
    """What a worker of audits does: pieces of one subject after another, each subject with a bench of its own."""

    def __init__(self):
        self._kept, self._bench = Kept(), None

    def __call__(self, piece: Piece, subject: Subject) -> dict[str, np.ndarray]:
        """What the piece's test measures."""
        if self._bench is None or self._bench.subject is not subject:
            self._bench = None  # before the next one is built, so that one generator is in memory
            self._bench = Bench(subject, self._kept, piece.generator)
        return self._bench(piece)


class Bench:
    """subject: what is audited. Nothing that it measures depends on which worker asks, or what that one has measured
    before."""

    def __init__(self, subject: Subject, kept: Kept | None = None, first: str | None = None):
        """kept: what there is from the run before. first: the generator that is asked for first."""
        settings = subject.run.settings
        patience.use(settings.storage.patience)
        torch.set_num_threads(settings.training.threads)
        self.subject, self.device, self._kept = subject, measure.device(settings), kept or Kept()
        models = subject.every if first is None else {first: subject.every[first]} | subject.every
        images = self._kept.images(subject)
        self.compared = Comparison(replace(subject.run, measured=subject.sets), models, self.device, images)
        self._kept.make_room(subject, self.compared.size)
        self._views: dict[tuple, views.View] = {}

    def __call__(self, piece: Piece) -> dict[str, np.ndarray]:
        """What the piece's test measures, and "seconds"."""
        began = time.perf_counter()
        found = self.subject.tests[piece.test].measure(piece, self)
        return found | {"seconds": np.array([time.perf_counter() - began])}

    @property
    def network(self) -> torch.nn.Module:
        """The feature network of the run's evaluation."""
        return self._kept.network(self.subject)

    @property
    def size(self) -> int:
        return self.compared.size

    def generator(self, name: str) -> Adapter:
        """The generator of that name, its parameters without gradient; one is in memory at a time."""
        return self.compared.generator(name)

    def pixels(self, name: str, start: int, stop: int) -> tuple[np.ndarray, torch.Tensor]:
        """(positions, uint8 (B, 3, S, S)) of the images start .. stop of a set; damaged ones are left out."""
        kept, pixels = self.compared.pixels(name, np.arange(start, stop))
        on_their_side = name == "unseen" and self.subject.settings.unseen is None
        return kept, pixels.rot90(1, (2, 3)).contiguous() if on_their_side else pixels

    def some(self, name: str, start: int, stop: int) -> tuple[np.ndarray, torch.Tensor]:
        """The same of the images start .. stop of a random order of the set, so that each part has all of its
        classes."""
        return self.compared.pixels(name, self.subject.shuffled(name)[start:stop])

    def view(self, spec: config.ViewSpec, number: int, name: str, positions: np.ndarray) -> views.View:
        """The view `number` of a kind of the images at these positions of a set, whatever batch they are in."""
        key = (spec.name, number, name)
        if key not in self._views:
            rng = order.generator(self.subject.settings.seed, STREAM, number, sorted(self.subject.sets).index(name))
            self._views[key] = views.draw([spec], self.compared.grid, len(self.subject.sets[name]), rng)
        whole, at = self._views[key], torch.from_numpy(positions)
        return views.View(whole.visible[at], whole.hidden[at], whole.grid).to(self.device)

    @torch.no_grad()
    def errors(self, piece: Piece, specs: Sequence[config.ViewSpec]) -> np.ndarray:
        """(B, views) mean squared error in the hole of a piece's images, pixels in [0, 1]; view i is of specs[i]."""
        kept, pixels = self.pixels(piece.what, piece.start, piece.stop)
        real, columns = pixels.float() / 255, []
        for number, spec in enumerate(specs):
            view = self.view(spec, number, piece.what, kept)
            made = self.compared.reconstruct(piece.generator, pixels, view)
            columns.append(hole_errors(made, real, view.pixel_mask(self.size)).cpu().numpy())
        return np.stack(columns, 1) if len(pixels) else np.empty((0, len(specs)))

    @torch.no_grad()
    def losses(self, piece: Piece, specs: Sequence[config.ViewSpec]) -> np.ndarray:
        """(B, views) of the loss that the family is trained with, row by row; of a diffusion model each at its own
        timestep."""
        kept, pixels = self.pixels(piece.what, piece.start, piece.stop)
        model = self.generator(piece.generator)
        rows = np.empty((len(pixels), len(specs)))
        for number, spec in enumerate(specs):
            view = self.view(spec, number, piece.what, kept)
            for i in range(len(pixels)):
                one = view.rows(i, i + 1)
                inputs = model.inputs(model.normalise(pixels[i : i + 1]), one)
                rows[i, number] = float(model.training_loss(inputs, one, number))
        return rows

    @torch.no_grad()
    def embeddings(self, piece: Piece, spec: config.ViewSpec) -> np.ndarray:
        """(B, D) pooled embeddings of a piece's images under the first view of a kind."""
        kept, pixels = self.pixels(piece.what, piece.start, piece.stop)
        model, view = self.generator(piece.generator), self.view(spec, 0, piece.what, kept)
        embedding = model.encode(model.inputs(model.normalise(pixels), view), view)
        return pooled(embedding).cpu().double().numpy()

    def labels(self, piece: Piece) -> np.ndarray:
        """(B,) labels of a piece's images."""
        kept, _ = self.pixels(piece.what, piece.start, piece.stop)
        return self.subject.labels(piece.what)[kept]


def pooled(embedding: Embedding) -> torch.Tensor:
    """(B, D): the mean over tokens, or over places, of every level, side by side.

    A level is (B, tokens, width) or (B, channels, height, width).
    """
    levels = [embedding] if isinstance(embedding, torch.Tensor) else embedding
    return torch.cat([x.float().mean(1) if x.dim() == 3 else x.float().flatten(2).mean(2) for x in levels], 1)
