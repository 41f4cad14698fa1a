"""Probes: what does the encoder still say, whatever the decoder makes of it?

class               a linear probe for the class, in closed form on pooled embeddings
forget or not       another, for whether an image is of the forget set
original decoder    the decoder of the original model on the encoder that is audited
fresh decoder       a decoder of random weights, trained on the frozen encoder with half of the forget images, tested on
                    the other
retrieval           whether the hole of an output leads to its own original among other forget images

The linear probes are fitted on training images and tried on held-out ones of the same classes, the other figures are of
forget images of training.
"""

from typing import Any

import numpy as np
import torch
from pydantic import Field

from unlearn.audit import linear, statistics, tuning
from unlearn.audit.base import ORIGINAL, UNLEARNED, AuditTest, Figure, Measured, Piece, Rule
from unlearn.audit.bench import Bench
from unlearn.audit.subject import Subject
from unlearn.config import Part, Positive, ViewSpec
from unlearn.evaluation.metrics import hole_errors
from unlearn.models import weights
from unlearn.models.base import Adapter

SETS = ("forget", "forget_new", "retain", "retain_new")
OLD, FRESH, SOUGHT, GALLERY = "original decoder", "fresh decoder", "retrieval", "gallery"


class ProbesOptions(Part):
    """Of probes."""

    view: ViewSpec = Field(default=ViewSpec(size=0.5), description="under which the images are embedded and filled in")
    ridge: float = Field(default=0.01, gt=0, description="penalty of the linear probes")
    steps: Positive = Field(default=200, description="of training the fresh decoder")
    batch_size: Positive = 32
    lr: float = Field(default=1e-3, gt=0, description="of the fresh decoder")
    images: Positive = Field(default=200, description="images among which retrieval and the decoders are tried")
    margin: float = Field(default=1.0, gt=0, description="dB above the oracle that the decoders may recover")
    class_margin: float = Field(default=0.05, gt=0, description="accuracy above the oracle's that is allowed")
    forget_margin: float = Field(
        default=0.02, gt=0, description="AUC of forget-or-not above the oracle's that is allowed"
    )
    retrieval_margin: float = Field(default=0.05, gt=0, description="share found above the oracle's that is allowed")


class Probes(AuditTest):
    """Linear probes, decoders and retrieval on what the encoder still gives."""

    name = "probes"
    title = "Probes"
    shows = (
        "Whether the encoder still carries what the outputs no longer show: for a simple reader, for the old "
        "decoder, for a new one."
    )
    hides = (
        "A reader more able than these; and a fresh decoder that is trained for longer recovers more, from any encoder."
    )
    cost = "embeddings of all images, steps of training a decoder"
    needs = SETS
    schema = 2
    Options = ProbesOptions
    options: ProbesOptions

    def reads(self, subject: Subject, piece: Piece) -> list[Any]:
        if piece.what == OLD:
            return [piece.generator == UNLEARNED]
        return [subject.network] if piece.what in (SOUGHT, GALLERY) else []

    def pieces(self, subject: Subject) -> list[Piece]:
        count = min(self.options.images, len(subject.sets["forget"]))
        pieces = self.batches(subject, SETS)
        if ORIGINAL in subject.models:
            pieces += [Piece(self.name, g, OLD, 0, count) for g in subject.models]
        if len(subject.sets["forget"]) > 1:
            pieces += [Piece(self.name, generator, FRESH) for generator in subject.models]
        pieces += [Piece(self.name, generator, SOUGHT, 0, count) for generator in subject.models]
        return [*pieces, Piece(self.name, next(iter(subject.models)), GALLERY, 0, count)]

    def measure(self, piece: Piece, bench: Bench) -> dict[str, np.ndarray]:
        if piece.what in SETS:
            return {"embeddings": bench.embeddings(piece, self.options.view), "labels": bench.labels(piece)}
        if piece.what == FRESH:
            return {"errors": self._fresh(piece, bench)}
        if piece.what == OLD:
            return {"errors": self._old(piece, bench)}
        kept, pixels = bench.some("forget", piece.start, piece.stop)
        view = bench.view(self.options.view, 0, "forget", kept)
        images = pixels.float() / 255
        if piece.what == SOUGHT:
            images = bench.compared.reconstruct(piece.generator, pixels, view)
        return {"features": bench.network(_cut(images, view.pixel_mask(bench.size)))[0].cpu().double().numpy()}

    def _old(self, piece: Piece, bench: Bench) -> np.ndarray:
        """Errors with the original decoder; of an oracle, to whose encoder it does not belong, with its own."""
        model = bench.generator(piece.generator)
        own = model.decoder
        if piece.generator == UNLEARNED:
            original = weights.build(
                bench.subject.models[ORIGINAL], bench.subject.run.settings.seed, bench.subject.run.sources
            )
            model.decoder = original.requires_grad_(False).to(bench.device).decoder
        try:
            return self._errors(model, bench, piece.start, piece.stop)
        finally:
            model.decoder = own

    def _fresh(self, piece: Piece, bench: Bench) -> np.ndarray:
        """Errors on one half of the forget images of a decoder that was trained on the other, both drawn."""
        half = len(bench.subject.sets["forget"]) // 2
        _, shown = bench.some("forget", 0, half)
        model = tuning.with_fresh_decoder(bench.generator(piece.generator), bench.subject.settings.seed)
        options = self.options
        tuning.tune(
            model, shown, [options.view], options.steps, options.batch_size, options.lr, bench.subject.settings.seed
        )
        return self._errors(model, bench, half, min(2 * half, half + options.images))

    @torch.no_grad()
    def _errors(self, model: Adapter, bench: Bench, start: int, stop: int) -> np.ndarray:
        kept, pixels = bench.some("forget", start, stop)
        view = bench.view(self.options.view, 0, "forget", kept)
        made = model.denormalise(model.reconstruct(model.normalise(pixels), view))
        return hole_errors(made, pixels.float() / 255, view.pixel_mask(bench.size)).cpu().numpy()

    def figures(self, measured: Measured, subject: Subject) -> list[Figure]:
        options, models = self.options, list(subject.models)
        known, absent = {}, "not every image has a class, or not one that can be compared with training's"
        if all((measured[models[0], name]["labels"] >= 0).all() for name in SETS[:3]):
            known = {g: subject.estimate(statistics.average, self._classes(measured, g)) for g in models}
            absent = ""
        rule, title = Rule("above", options.class_margin), "class of forget images by a linear probe: accuracy"
        figures = [Figure("class", title, known, rule, absent=absent)]
        rule, known, absent = Rule("above", options.forget_margin, power=False, most=1.0), {}, ""
        if subject.same_classes:
            absent = "held-out images are of the same classes on both sides, so there is nothing to tell apart"
        else:
            known = {g: subject.estimate(statistics.auc, *self._forget_or_not(measured, g)) for g in models}
        title = "forget image or not by a linear probe: AUC"
        figures.append(Figure("forget_or_not", title, known, rule, absent=absent))
        for what, name, title in (
            (OLD, "original_decoder", "original decoder on this encoder: PSNR of forget images, dB"),
            (FRESH, "fresh_decoder", "fresh decoder on this encoder: PSNR of forget images, dB"),
        ):
            known = {
                g: subject.estimate(statistics.psnr, measured[g, what]["errors"])
                for g in models
                if (g, what) in measured
            }
            if known or what == FRESH:
                absent = "" if known else "it takes two forget images, to learn from one and to try the other"
                figures.append(Figure(name, title, known, Rule("above", options.margin), 2, absent=absent))
        gallery = measured[models[0], GALLERY]["features"]
        known = {
            g: subject.estimate(statistics.average, _found(measured[g, SOUGHT]["features"], gallery)) for g in models
        }
        rule = Rule("above", options.retrieval_margin)
        title = f"output leads to its own original among {len(gallery)}: share"
        return [*figures, Figure("retrieval", title, known, rule)]

    def _classes(self, measured: Measured, generator: str) -> np.ndarray:
        """(N,) whether the class of each unseen forget image is found by a probe fitted on training images."""
        train, labels = (
            np.concatenate([measured[generator, name][key] for name in ("forget", "retain")])
            for key in ("embeddings", "labels")
        )
        known = np.unique(labels)
        probe = linear.fit(train, (labels[:, None] == known) * 1.0, self.options.ridge)
        test = measured[generator, "forget_new"]
        return (known[probe(test["embeddings"]).argmax(1)] == test["labels"]) * 1.0

    def _forget_or_not(self, measured: Measured, generator: str) -> tuple[np.ndarray, np.ndarray]:
        kinds = [measured[generator, name]["embeddings"] for name in SETS]
        train, targets = np.concatenate([kinds[0], kinds[2]]), np.r_[np.ones(len(kinds[0])), -np.ones(len(kinds[2]))]
        probe = linear.fit(train, targets[:, None], self.options.ridge)
        return probe(kinds[1])[:, 0], probe(kinds[3])[:, 0]


def _cut(images: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The smallest rectangle of each image that holds its hole, in the size of the largest of them: (B, 3, h, w)."""
    rows, columns = hidden.any(3).squeeze(1), hidden.any(2).squeeze(1)
    height, width = (int(x.sum(1).max()) for x in (rows, columns))
    top, left = (x.int().argmax(1) for x in (rows, columns))
    top, left = top.clamp(max=images.shape[2] - height), left.clamp(max=images.shape[3] - width)
    cut = [
        image[:, t : t + height, x : x + width] for image, t, x in zip(images, top.tolist(), left.tolist(), strict=True)
    ]
    return torch.stack(cut)


def _found(outputs: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(N,) whether of all originals its own is nearest to an output, by cosine of features without their mean."""
    mean = gallery.mean(0)
    a, b = ((x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True).clip(1e-12) for x in (outputs, gallery))
    return ((a @ b.T).argmax(1) == np.arange(len(a))) * 1.0
