"""What is compared: the images, what of them is hidden, and what each generator makes of them."""

import logging
from functools import cached_property

import numpy as np
import torch

from unlearn import config, views
from unlearn.data import cache, order
from unlearn.data.images import Images
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, ImageError, UnlearnError
from unlearn.evaluation import oracles
from unlearn.models import base, weights
from unlearn.run import Run

log = logging.getLogger(__name__)

GREY = 128


def generators(settings: config.RunConfig) -> dict[str, config.Model]:
    """What is compared, in the order of the tables: original (the config's weights), unlearned (once trained), oracle;
    further oracles as "oracle 2" and so on."""
    uris = {"original": settings.model.weights, "unlearned": None}
    uris |= {oracles.name(number): uri for number, uri in enumerate(settings.evaluation.oracles)}
    folder = Storage(settings.run_dir)
    trained = "model_ema" if settings.evaluation.weights == "ema" else "model"
    if folder.is_file(f"{trained}/{weights.CARD}"):
        uris["unlearned"] = folder.where(trained)
    models = {name: settings.model.model_copy(update={"weights": uri}) for name, uri in uris.items() if uri}
    if not models:
        raise UnlearnError(
            f"nothing to evaluate: no model.weights in the config and no trained model in {settings.run_dir}"
        )
    return models


def located(run: Run, models: dict[str, config.Model]) -> Run:
    """The run that knows the weights of all of these generators. Raises ConfigError where an oracle is the original,
    the model that is to be judged, or another oracle: that none differs from it would then say nothing, and the
    oracles' spread too little."""
    run = run.with_weights(model.weights for model in models.values())
    known: dict[str, str] = {}  # fingerprint -> generator
    for name in sorted(models, key=lambda name: name.startswith(oracles.ORACLE)):
        fingerprint = run.sources[models[name].weights or ""].fingerprint
        if name.startswith(oracles.ORACLE) and fingerprint in known:
            raise ConfigError(
                f"evaluation.oracle: {models[name].weights} holds the weights of the {known[fingerprint]}; an oracle "
                "is a model of its own, trained without the forget set with a seed of its own (`unlearn oracle`)"
            )
        known.setdefault(fingerprint, name)
    return run


def others(run: Run, models: dict[str, config.Model]) -> list[str]:
    """What is to be said of each oracle that was trained without other images than this run forgets, where its folder
    says so."""
    told = []
    for name, model in models.items():
        without = run.sources[model.weights or ""].card.get("without") if name.startswith(oracles.ORACLE) else None
        if without and "forget" in run.sets and without != run.sets["forget"].digest:
            told.append(
                f"evaluation.oracle: {model.weights} was trained without other images than this run forgets, so it may "
                "know some of what is to be forgotten"
            )
    return told


def warn_of_others(run: Run, models: dict[str, config.Model]) -> None:
    """Warn of these."""
    for told in others(run, models):
        log.warning("%s", told)


class Comparison:
    """The images of an evaluation, their views, and what each generator makes of them. One generator is in memory at a
    time."""

    def __init__(
        self, run: Run, models: dict[str, config.Model], device: torch.device | str = "cpu",
        kept: cache.ImageCache | None = None
    ):  # fmt: skip
        """kept: a cache that holds images already."""
        self.settings, self.sets, self.models, self.device = run.settings, run.measured, models, torch.device(device)
        self.sources = run.sources
        self._views: dict[tuple[str, int], views.View] = {}
        self._loaded: tuple[str, base.Adapter] | None = None
        first = next(iter(models))
        self.grid, self.size = self._shape(self.generator(first))
        workers = run.settings.evaluation.workers or run.settings.cluster.workers
        self._kept = kept or cache.image_cache(run.settings.data, workers)

    @cached_property
    def images(self) -> dict[str, Images]:
        """By set. They are opened when they are asked for first, so that a cache can make room for them before."""
        return {name: Images(rows, self.settings.data, self._kept, self.size) for name, rows in self.sets.items()}

    def generator(self, name: str) -> base.Adapter:
        """The generator of that name, on the device; the one before it is let go. Raises ConfigError where its shape is
        another."""
        if self._loaded is None or self._loaded[0] != name:
            former = self._loaded[0] if self._loaded else None
            self._loaded = None  # before the next one is built, so that there is one in memory
            built = (
                weights.build(self.models[name], self.settings.seed, self.sources).requires_grad_(False).to(self.device)
            )
            if self.settings.evaluation.guidance_scale is not None:
                built.guide(self.settings.evaluation.guidance_scale)
            if former is not None and self._shape(built) != (self.grid, self.size):
                known = f"{former} {self.size} px in {self.grid} x {self.grid} patches"
                other = f"{name} {built.options.image_size} px in {built.grid} x {built.grid} patches"
                raise ConfigError(
                    f"the generators do not see the same images and views: {known}, {other}; compare models of one "
                    "shape"
                )
            self._loaded = name, built
        return self._loaded[1]

    @staticmethod
    def _shape(model: base.Adapter) -> tuple[int, int]:
        return model.grid, model.options.image_size

    def pixels(self, name: str, positions: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """(positions kept, uint8 (B, 3, S, S)) of a set's images; damaged ones are left out, and counted as in
        training."""
        images, kept, pixels = self.images[name], [], []
        for position in positions.tolist():
            row = int(images.set.rows[position])
            try:
                image = images[row]
            except ImageError as e:
                images.skip(row, e)
                continue
            kept.append(position)
            pixels.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return np.array(kept, np.int64), torch.stack(pixels).to(self.device) if pixels else empty.to(self.device)

    def view(self, name: str, number: int, positions: np.ndarray) -> views.View:
        """View `number` of evaluation.views of the images at these positions.

        Drawn for the whole set at once (a size given as a range is drawn once), so that it depends on the seed, the set
        and the number alone: not on batches and not on workers.
        """
        if (name, number) not in self._views:
            # A part of a set (forget_new) comes behind the sets, whose views are the same with and without it.
            sets = sorted(self.sets, key=lambda other: ("_" in other, other))
            rng = order.generator(self.settings.seed, 1 << 22, number, sets.index(name))
            self._views[name, number] = views.draw(
                [self.settings.evaluation.views[number]], self.grid, len(self.sets[name]), rng
            )
        whole, at = self._views[name, number], torch.from_numpy(positions)
        return views.View(whole.visible[at], whole.hidden[at], self.grid).to(self.device)

    @torch.inference_mode()
    def reconstruct(self, generator: str, pixels: torch.Tensor, view: views.View) -> torch.Tensor:
        """float32 (B, 3, S, S) in [0, 1]: the hidden patches filled in, the visible ones as they were."""
        model = self.generator(generator)
        return model.denormalise(model.reconstruct(model.normalise(pixels), view))

    def picture_rows(self, name: str) -> np.ndarray:
        """Positions of evaluation.pictures images spread evenly over a set."""
        count = self.settings.evaluation.pictures
        return np.unique(np.linspace(0, len(self.sets[name]) - 1, count).round().astype(np.int64))

    def column(self, name: str, generator: str | None) -> torch.Tensor:
        """One column of a set's picture grid under the first view, uint8 (rows, 3, S, S) on the CPU: what a generator
        makes of the images; for None twice as many rows, the images themselves and then what the generators see of
        them."""
        kept, pixels = self.pixels(name, self.picture_rows(name))
        view = self.view(name, 0, kept)
        if generator is None:
            return torch.cat([pixels, pixels.masked_fill(view.pixel_mask(self.size), GREY)]).cpu()
        return (self.reconstruct(generator, pixels, view) * 255).round().to(torch.uint8).cpu()

    def labels(self, name: str) -> list[str]:
        """The class of each row of the picture grid."""
        kept, _ = self.pixels(name, self.picture_rows(name))
        rows = self.sets[name]
        return [rows.manifest.class_name(label) for label in rows.labels[kept].tolist()]
