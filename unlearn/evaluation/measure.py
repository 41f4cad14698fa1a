"""Measure what the generators of a run make of the forget and the retain set, piece by piece, and put the figures
together.

metrics.json holds

    software, name, config_hash      what was run
    features, resize                 name of the feature network, and how images got to its size: figures of different
                                     ones cannot be compared
    guidance_scale                   of sampling; null without guidance
    views, generators                names, in the order of the tables; the first view is the main one
    weights                          {generator: sha256 of the weights that were measured}
    networks                         {"features", and "lpips" where it was measured: sha256 of the weights of what
                                     looked at the images}
    sets                             {set: {images, classes, manifest (sha256), split: "held-out" | "training",
                                     bad_images}}
    oracles                          where there are several: the rows of each; in `rows` the oracle is their mean,
                                     `spread` theirs
    oracle_distance                  where there are several: see unlearn/evaluation/oracles.py
    rows                             [{generator, set, view, images, fid, kid, is, is_std, cosine, cosine_std, psnr,
                                     ssim}]: fid and kid against the set's own originals; is and is_std over ten splits;
                                     cosine of each reconstruction's features to its original's, mean and standard
                                     deviation; psnr in dB and ssim, inside the hole alone; with
                                     evaluation.lpips_weights also lpips, of the whole image, what is known of it pasted
                                     back; null where a figure cannot be given. Of all but the deviations also
                                     FIGURE_low and FIGURE_high: 95 % intervals by the bootstrap over images, that of is
                                     by its splits; the bias that few images give fid and is, is not in them
    notes                            sentences a reader of the figures must know
    seconds                          worker time by stage, and the whole by the clock
    training_seconds                 time in training steps, from metrics.jsonl; null without it

No image, no id and no embedding of the sets is in it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from unlearn import __version__, config, patience
from unlearn.data import cache, selection
from unlearn.errors import UnlearnError
from unlearn.evaluation import features, oracles, perceptual
from unlearn.evaluation.comparison import Comparison
from unlearn.evaluation.metrics import STABLE, hole_errors, hole_ssim, scores
from unlearn.models import weights
from unlearn.run import Run

# Called with (images done, images in all); an image counts once for itself, and once a generator and view.
Progress = Callable[[int, int], None]
# Maps pieces to results, in the order of the pieces.
Map = Callable[[Iterable[Any]], Iterator[Any]]


@dataclass
class Known:
    """What several evaluations of the same images share: the features of the originals by set, and the rows of the
    generators that stay the same, by (set, view, generator)."""

    real: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[tuple[str, int, str], dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """One piece of measuring: positions start .. stop of a set; generator None: the originals themselves."""

    set: str
    generator: str | None
    view: int
    start: int
    stop: int


@dataclass(frozen=True)
class Column:
    """One column of a set's picture grid; generator None: the images themselves, and what the generators see of
    them."""

    set: str
    generator: str | None


class Measurer:
    """What a worker does with one piece after another: it holds the images, the feature network, and one generator at a
    time."""

    def __init__(
        self, run: Run, models: dict[str, config.Model], looks: bool = True, network: torch.nn.Module | None = None,
        kept: cache.ImageCache | None = None,
    ):  # fmt: skip
        """looks: whether figures are wanted, and so the feature network; else pictures alone. network, kept: the
        feature network on its device, and a cache of images, where this process has them already."""
        settings = run.settings
        patience.use(settings.storage.patience)
        torch.set_num_threads(settings.training.threads)
        self.compared = Comparison(run, models, device(settings), kept)
        self.network = network or (feature_network(settings) if looks else None)
        trunk = settings.evaluation.lpips_weights if looks else None
        self.perceptual = perceptual.build(trunk).to(device(settings)) if trunk else None

    def __call__(self, piece: Piece | Column) -> dict:
        return self.picture(piece) if isinstance(piece, Column) else self.measure(piece)

    def measure(self, piece: Piece) -> dict:
        """{"features": (B, D), "classes": (B, C) or None, "holes": {figure: (B,)} of generators, "seconds"}."""
        assert self.network is not None, "made for pictures alone"
        began, holes = time.perf_counter(), {}
        kept, pixels = self.compared.pixels(piece.set, np.arange(piece.start, piece.stop))
        images = pixels.float() / 255
        if not len(images):
            return {"features": images.new_empty(0, 0), "classes": None, "holes": {}, "seconds": 0.0}
        if piece.generator:
            view = self.compared.view(piece.set, piece.view, kept)
            made = self.compared.reconstruct(piece.generator, pixels, view)
            hidden = view.pixel_mask(self.compared.size)
            holes = {"errors": hole_errors(made, images, hidden).cpu(), "ssim": hole_ssim(made, images, hidden).cpu()}
            if self.perceptual is not None:
                holes["lpips"] = self.perceptual(made, images).cpu()
            images = made
        vectors, classes = self.network(images)
        classes = classes if classes is None else classes.cpu()
        seconds = time.perf_counter() - began
        return {"features": vectors.cpu(), "classes": classes, "holes": holes, "seconds": seconds}

    def picture(self, column: Column) -> dict:
        """{"labels": the class of each row, "images": uint8 (rows, 3, S, S); for the images themselves "seen"
        besides}."""
        images = self.compared.column(column.set, column.generator)
        if column.generator is not None:
            return {"images": images}
        whole, seen = images.chunk(2)
        return {"labels": self.compared.labels(column.set), "images": whole, "seen": seen}


def device(settings: config.RunConfig) -> str:
    """What a worker measures on."""
    return "cuda" if settings.cluster.gpus_per_worker else "cpu"


def feature_network(settings: config.RunConfig) -> torch.nn.Module:
    """The network that looks at images, on the worker's device."""
    evaluation = settings.evaluation
    network = features.build(evaluation.features, evaluation.features_weights, evaluation.resize)
    return network.to(device(settings))


def networks(settings: config.RunConfig) -> dict[str, str]:
    """sha256 of the weights of what looks at the images."""
    evaluation = settings.evaluation
    files = {
        "features": features.file(evaluation.features, evaluation.features_weights),
        "lpips": evaluation.lpips_weights,
    }
    return {name: weights.locate(uri).fingerprint for name, uri in files.items() if uri}


def evaluate(
    run: Run, models: dict[str, config.Model], mapped: Map, pictured: list[str],
    progress: Progress = lambda done, total: None,
    known: Known | None = None,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """(what metrics.json holds but for the whole time, the picture grids of the sets `pictured`), every generator
    loaded once a worker.

    mapped: calls a Measurer of this run and these models on pieces. The figures do not depend on the number of workers.
    known: what is known from another evaluation of the same images, views and original; what this one finds out is
    added to it.
    """
    every, kept, seconds, pictures = _rows(run, list(models), mapped, pictured, progress, known or Known())
    rows, single = oracles.folded(every)
    settings = run.settings
    apart = bool(settings.evaluation.data or settings.evaluation.split)
    sources = weights.located((model.weights for model in models.values()), run.sources)
    document = {
        "software": f"unlearn {__version__}", "name": settings.name, "config_hash": settings.hash(),
        "features": settings.evaluation.features,
        "resize": features.resizing(settings.evaluation.features, settings.evaluation.resize),
        "guidance_scale": settings.evaluation.guidance_scale,
        "views": [view.name for view in settings.evaluation.views], "generators": oracles.shown(models),
        "weights": {name: sources[model.weights].fingerprint for name, model in models.items() if model.weights},
        "networks": networks(settings),
        "sets": {
            name: described | {
                "split": "held-out" if apart and described["manifest"] != run.trained_on else "training",
                "bad_images": len(run.measured[name]) - kept[name],
            }
            for name, described in selection.describe(run.measured).items()
        },
        "rows": rows,
    }  # fmt: skip
    if single:
        count = len(settings.evaluation.oracles)
        document |= {"oracles": single, "oracle_distance": oracles.distance(rows, document["views"][0], count)}
    document["notes"] = _notes(settings, document)
    document["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    return document, grids(pictures, list(models), pictured)


def columns(generators: list[str], pictured: list[str]) -> list[Column]:
    """The columns of the picture grids of these sets, those of one generator after the other."""
    return [Column(name, generator) for generator in (None, *oracles.shown(generators)) for name in pictured]


def grids(pictures: dict[Column, dict], generators: list[str], pictured: list[str]) -> list[dict]:
    """[{"set", "labels", "columns": [(title, uint8 (rows, 3, S, S)), ...]}] of what a Measurer made of `columns`."""
    made = []
    for name in pictured:
        first = pictures[Column(name, None)]
        titled = [("the image", first["images"]), ("what the model sees", first["seen"])]
        titled += [
            (f"{generator} model", pictures[Column(name, generator)]["images"])
            for generator in oracles.shown(generators)
        ]
        made.append({"set": name, "labels": first["labels"], "columns": titled})
    return made


def _rows(run: Run, generators: list[str], mapped: Map, pictured: list[str], progress: Progress, known: Known):
    """(rows of metrics.json, images measured by set, seconds by stage, pictures by column)."""
    settings, sizes = run.settings, {name: len(rows) for name, rows in run.measured.items()}
    step, views = settings.evaluation.batch_size, range(len(settings.evaluation.views))
    # Generator by generator, so that a worker loads each once; what is compared with stays in memory: the originals'
    # features.
    cells = [(name, None, 0) for name in sizes if name not in known.real] + [
        (name, g, view) for g in generators for name in sizes for view in views if (name, view, g) not in known.rows
    ]
    pieces: list[Piece | Column] = []
    for name, generator, view in cells:
        pieces += [Piece(name, generator, view, i, min(i + step, sizes[name])) for i in range(0, sizes[name], step)]
    pieces += columns([], pictured)
    for generator in oracles.shown(generators):  # behind the last piece that this generator measures
        last = max((i for i, piece in enumerate(pieces) if piece.generator == generator), default=len(pieces) - 1)
        pieces[last + 1 : last + 1] = [Column(name, generator) for name in pictured]
    total, done = sum(p.stop - p.start for p in pieces if isinstance(p, Piece)), 0
    figures, real = dict(known.rows), known.real
    pictures: dict[Column, dict] = {}
    seconds = {"originals": 0.0} | dict.fromkeys([*generators, "figures"], 0.0)
    parts: list[dict] = []
    for piece, result in zip(pieces, mapped(pieces), strict=True):
        if isinstance(piece, Column):
            pictures[piece] = result
            continue
        parts.append(result)
        done += piece.stop - piece.start
        progress(done, total)
        if piece.stop < sizes[piece.set]:
            continue
        seconds[piece.generator or "originals"] += sum(part["seconds"] for part in parts)
        began, name = time.perf_counter(), piece.set
        made, classes, holes = _joined(parts)
        if piece.generator is None:
            if made is None:
                raise UnlearnError(f"no image of the {name} set decodes: nothing to measure")
            real[name] = made
        else:
            row = {"generator": piece.generator, "set": name, "view": settings.evaluation.views[piece.view].name}
            figures[name, piece.view, piece.generator] = row | scores(real[name], made, classes, holes, settings.seed)
            if piece.generator != "unlearned":
                known.rows[name, piece.view, piece.generator] = figures[name, piece.view, piece.generator]
        parts = []
        seconds["figures"] += time.perf_counter() - began
    rows = [figures[name, view, generator] for name in sizes for view in views for generator in generators]
    return rows, {name: len(real[name]) for name in sizes}, seconds, pictures


def _joined(parts: list[dict]) -> tuple:
    """Features and class scores of all batches, in order, or None, and the figures of their holes; a batch of damaged
    images alone adds nothing."""
    parts = [part for part in parts if len(part["features"])]
    columns = ([part[key] for part in parts] for key in ("features", "classes"))
    vectors, classes = (torch.cat(column) if column and column[0] is not None else None for column in columns)
    names = parts[0]["holes"] if parts else ()
    return vectors, classes, {name: torch.cat([part["holes"][name] for part in parts]) for name in names}


def _notes(settings: config.RunConfig, document: dict) -> list[str]:
    notes = []
    measured = {name: described["images"] - described["bad_images"] for name, described in document["sets"].items()}
    if min(measured.values()) < STABLE:
        counts = ", ".join(f"{count:,} images of the {name} set" for name, count in measured.items())
        notes.append(
            f"FID rests on {counts}. Fewer than {STABLE:,} are too few for a covariance: the value is biased upwards "
            "and only indicates. Compare it within this table, not with other work; KID is not biased by few images."
        )
    for name, described in document["sets"].items():
        if described["split"] == "training":
            held_out = settings.evaluation.data not in (None, settings.data.train)
            why = "held-out shards have no such rows" if held_out else "evaluation.data names no held-out ones"
            notes.append(f"The {name} set is measured on training images: {why}.")
        if described["bad_images"]:
            notes.append(f"{described['bad_images']} damaged image(s) of the {name} set were left out.")
    if settings.evaluation.weights == "ema" and "unlearned" in document["generators"]:
        notes.append(f"The unlearned model is the moving average of the weights, decay {settings.training.ema}.")
    if settings.evaluation.guidance_scale is not None:
        notes.append(
            f"Samples were led towards the prompt by a guidance scale of {settings.evaluation.guidance_scale:g}."
        )
    if any(row["is"] is None for row in document["rows"]):
        notes.append(f"{document['features']} has no class scores: no Inception Score.")
    elif document["features"] != "inception":
        notes.append(
            f"FID and IS are computed with {document['features']}, not with the Inception network of the literature: "
            "compare them within this report alone."
        )
    return notes
