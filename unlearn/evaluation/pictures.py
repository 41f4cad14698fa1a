"""The pictures that are compared: which images, what of them is hidden, and what each generator makes of them."""

import base64
import functools
import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from unlearn import config, views
from unlearn.data import order, selection, shards
from unlearn.data.loader import Images, fit
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, UnlearnError
from unlearn.models import weights

GREY = 128


def sets(run: config.RunConfig) -> dict[str, RowSet]:
    """{"forget": ..., "retain": ...} to measure on, each cut to evaluation.limit, drawn with the seed.

    Without evaluation.data: the training images, as training took them (a proxy in the retain role). With it: the held-out
    rows of the same classes. What held-out shards cannot have is measured on the training images: a set chosen by ids or
    subjects, and a forget set that no class describes. Retain is by its classes, or every held-out row that is not forgotten.
    """
    held_out = run.evaluation.data and shards.load(run.evaluation.data)
    # The training rows are looked up only where they are needed.
    trained = functools.cache(lambda: selection.sets(run.data, run.seed))
    found: dict[str, RowSet] = {}
    forget, retain = run.data.forget, run.data.retain or config.Rows()
    if forget is not None:
        by_class = forget.classes is not None or forget.exclude_classes is not None
        found["forget"] = _held_out(held_out, forget, run, "forget") if held_out and by_class else None
        found["forget"] = found["forget"] or trained()["forget"]
    if held_out:
        found["retain"] = _held_out(held_out, retain, run, "retain")
        if found["retain"] and forget is not None and found["forget"].manifest is held_out:
            keep = ~np.isin(found["retain"].rows, found["forget"].rows)
            found["retain"] = replace(found["retain"], rows=found["retain"].rows[keep], labels=found["retain"].labels[keep])
    found["retain"] = found.get("retain") or trained()["retain"]
    return {name: _limit(rows, run.evaluation.limit, run.seed) for name, rows in found.items()}


def _held_out(manifest: shards.Manifest, rows: config.Rows, run: config.RunConfig, what: str) -> RowSet | None:
    """The held-out rows of the same classes; None where the rows were named one by one."""
    if rows.ids is not None or rows.subjects is not None:
        return None
    classes = config.Rows(classes=rows.classes, exclude_classes=rows.exclude_classes)
    return selection.select(manifest, classes, run.seed, what)


def _limit(rows: RowSet, limit: int | None, seed: int) -> RowSet:
    if limit is None or len(rows) <= limit:
        return rows
    kept = np.sort(order.generator(seed, 1 << 21).permutation(len(rows))[:limit])
    return replace(rows, rows=rows.rows[kept], labels=rows.labels[kept])


def generators(run: config.RunConfig) -> dict[str, config.Model]:
    """What is compared, in the order of the tables: original (the config's weights), unlearned (once trained), oracle."""
    found = {"original": run.model.weights, "unlearned": None, "oracle": run.evaluation.oracle}
    folder = Storage(run.run_dir)
    if folder.is_file(f"model/{weights.CARD}"):
        found["unlearned"] = folder.where("model")
    models = {name: run.model.model_copy(update={"weights": uri}) for name, uri in found.items() if uri}
    if not models:
        raise UnlearnError(f"nothing to evaluate: no model.weights in the config and no trained model in {run.run_dir}")
    return models


class Comparison:
    """The images, views and generators of a run. Every generator sees the same pixels under the same views."""

    def __init__(self, run: config.RunConfig, device: torch.device | str = "cpu"):
        self.run, self.device, self.sets = run, torch.device(device), sets(run)
        self.images = {name: Images(rows, run.data) for name, rows in self.sets.items()}
        self.models = {
            name: weights.build(model, run.seed).requires_grad_(False).to(self.device) for name, model in generators(run).items()
        }
        shapes = {name: (model.grid, model.options.image_size) for name, model in self.models.items()}
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{name} {size} px in {grid} x {grid} patches" for name, (grid, size) in shapes.items())
            raise ConfigError(f"the generators do not see the same images and views: {told}; compare models of one shape")
        self.grid, self.size = next(iter(shapes.values()))
        self._views: dict[tuple[str, int], views.View] = {}

    def pixels(self, name: str, positions: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """(positions kept, uint8 (B, 3, S, S)) of a set's images; damaged ones are left out, and counted as in training."""
        images, kept, found = self.images[name], [], []
        for position in positions.tolist():
            row = int(images.set.rows[position])
            try:
                image = images[row]
            except (ValueError, OSError) as e:
                images.skip(row, e)
                continue
            kept.append(position)
            found.append(torch.from_numpy(fit(image, self.size).transpose(2, 0, 1).copy()))
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return np.array(kept, np.int64), torch.stack(found).to(self.device) if found else empty.to(self.device)

    def view(self, name: str, number: int, positions: np.ndarray) -> views.View:
        """View `number` of evaluation.views of the images at these positions.

        Drawn for the whole set at once (a size given as a range is drawn once), so that it depends on the seed, the set
        and the number alone: not on batches and not on workers.
        """
        if (name, number) not in self._views:
            rng = order.generator(self.run.seed, 1 << 22, number, sorted(self.sets).index(name))
            self._views[name, number] = views.draw([self.run.evaluation.views[number]], self.grid, len(self.sets[name]), rng)
        whole, at = self._views[name, number], torch.from_numpy(positions)
        return views.View(whole.visible[at], whole.hidden[at], self.grid).to(self.device)

    @torch.inference_mode()
    def reconstruct(self, generator: str, pixels: torch.Tensor, view: views.View) -> torch.Tensor:
        """float32 (B, 3, S, S) in [0, 1]: the hidden patches filled in, the visible ones as they were."""
        model = self.models[generator]
        return model.denormalise(model.reconstruct(model.normalise(pixels), view))

    def grid_rows(self, name: str, count: int) -> list[dict]:
        """`count` images spread evenly over a set, under the first view.

        Each is {"label": class, "cells": [(column, data URI), ...]} with columns image, view, and one for each generator.
        """
        spread = np.unique(np.linspace(0, len(self.sets[name]) - 1, count).round().astype(np.int64))
        kept, pixels = self.pixels(name, spread)
        view = self.view(name, 0, kept)
        columns = {"the image": pixels, "what the model sees": pixels.masked_fill(view.pixel_mask(self.size), GREY)}
        for generator in self.models:
            columns[f"{generator} model"] = (self.reconstruct(generator, pixels, view) * 255).round().to(torch.uint8)
        names, labels = self.sets[name].manifest.classes, self.sets[name].labels[kept].tolist()
        return [
            {
                "label": names[label] if label < len(names) else f"class {label}",
                "cells": [(column, data_uri(images[row].cpu())) for column, images in columns.items()],
            }
            for row, label in enumerate(labels)
        ]


def data_uri(image: torch.Tensor) -> str:
    """A uint8 image (3, S, S) as a data URI: PNG where it is small, JPEG where that would be heavy."""
    kind = "png" if image.shape[-1] <= 128 else "jpeg"
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, kind, quality=92)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
