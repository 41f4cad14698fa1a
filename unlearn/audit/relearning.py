"""Relearning: how soon is it back? A copy of each model is trained on, and the forget images are watched.

Whoever has the weights can do that. What comes back faster than the oracle learns it was hidden, not removed.
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from unlearn.audit import statistics, tuning
from unlearn.audit.base import ORIGINAL, AuditTest, Figure, Measured, Piece, Rule, oracles
from unlearn.audit.bench import Bench
from unlearn.audit.subject import Subject
from unlearn.config import Part, Positive, ViewSpec
from unlearn.evaluation.metrics import hole_errors


class RelearningOptions(Part):
    """Of relearning."""

    on: list[Literal["retain", "forget"]] = Field(
        default=["retain", "forget"],
        min_length=1,
        description="what is trained on: retain images, or `images` forget images",
    )
    images: Positive = Field(default=64, description="forget images that an attacker has")
    draws: Positive = Field(
        default=3,
        description="how often other forget images are drawn, where there are as many: which they are matters much, so "
        "the interval of few draws is wide",
    )
    retain_draws: Positive = Field(
        default=1,
        description="how often retain images are trained on, each time drawn with another seed; 1 gives no interval "
        "over them",
    )
    steps: Positive = 100
    batch_size: Positive = 32
    lr: float = Field(default=3e-4, gt=0, description="of AdamW, over encoder and decoder")
    view: ViewSpec = Field(default=ViewSpec(size=0.5), description="under which the forget images are watched")
    watched: Positive = Field(default=200, description="images that are watched")
    margin: float = Field(
        default=1.0,
        gt=0,
        description="dB above the oracle's curve that are allowed, at steps 1, 2, 5, 10, ...",
    )


class Relearning(AuditTest):
    """Steps of further training until the forget figure is back, beside the oracle's curve."""

    name = "relearning"
    title = "Relearning"
    shows = (
        "Whether a little further training brings back what was forgotten, sooner than a model learns it that "
        "never knew it."
    )
    hides = (
        "Other training (other learning rates, more steps) may bring back more; with one draw (on retain images the "
        "default, `retain_draws`) the chance of training is in no interval."
    )
    cost = "(retain_draws + draws) x steps of training"
    needs = ("forget", "forget_new", "retain")
    schema = 2
    Options = RelearningOptions
    options: RelearningOptions

    def reads(self, subject: Subject, piece: Piece) -> list[Any]:
        watched = [self.watched(subject, piece.what)] if subject.same_classes else []
        return [*(view.model_dump(mode="json") for view in subject.run.settings.train_views), *watched]

    def pieces(self, subject: Subject) -> list[Piece]:
        return [
            Piece(self.name, generator, what, start, stop)
            for generator in subject.models
            for what in self.options.on
            for start, stop in self._draws(subject, what)
        ]

    def _draws(self, subject: Subject, what: str) -> list[tuple[int, int]]:
        """The images that are trained on, start .. stop of the set's random order: other forget images in every draw.
        Of retain images, which are all trained on, start is the number of the draw."""
        count = len(subject.sets[what])
        if what == "retain":
            return [(n, count) for n in range(self.options.retain_draws)]
        if subject.same_classes:  # half of them are left to be watched
            count = (count + 1) // 2
        size = min(self.options.images, count)
        return [(n * size, (n + 1) * size) for n in range(min(self.options.draws, count // size))]

    def watched(self, subject: Subject, what: str) -> tuple[str, int, int]:
        """(set, start, stop) of the images that are watched, in the set's random order.

        They are new images of the forgotten classes. Where single images of classes that stay were chosen, these say
        nothing: then forget images that are not trained on.
        """
        name = "forget" if subject.same_classes else "forget_new"
        start = self._draws(subject, what)[-1][1] if (what, name) == ("forget", "forget") else 0
        count = len(subject.sets[name])
        start = start if start < count else 0  # there is one alone
        return name, start, min(start + self.options.watched, count)

    def measure(self, piece: Piece, bench: Bench) -> dict[str, np.ndarray]:
        """errors: (1, images, points) squared errors in the hole after each number of steps."""
        options, seed = self.options, bench.subject.settings.seed
        _, shown = bench.some(piece.what, 0 if piece.what == "retain" else piece.start, piece.stop)
        name, start, stop = self.watched(bench.subject, piece.what)
        kept, pixels = bench.some(name, start, stop)
        real, view = pixels.float() / 255, bench.view(options.view, 0, name, kept)
        model, columns = tuning.copied(bench.generator(piece.generator)), []

        @torch.no_grad()
        def watch(step: int) -> None:
            made = model.denormalise(model.reconstruct(model.normalise(pixels), view))
            columns.append(hole_errors(made, real, view.pixel_mask(bench.size)).cpu().numpy())

        tuning.tune(
            model, shown, bench.subject.run.settings.train_views, options.steps, options.batch_size, options.lr,
            seed + piece.start, tuning.rounds(options.steps), watch,
        )  # fmt: skip
        return {"errors": np.stack(columns, 1)[None]}

    def figures(self, measured: Measured, subject: Subject) -> list[Figure]:
        points, figures = tuning.rounds(self.options.steps), []
        for what in self.options.on:
            # (images, points, draws): whatever is estimated below is drawn anew over the images and over the draws.
            errors = {g: measured[g, what]["errors"].transpose(1, 2, 0) for g in subject.models}
            lines = {g: [statistics.psnr(e[:, point]) for point in range(len(points))] for g, e in errors.items()}
            draws = errors[next(iter(errors))].shape[2]
            known = oracles(errors)
            if known:
                reference = np.stack([errors[name] for name in known], 2)
                lead = statistics.widened(_lead, draws)
                leads = {
                    g: subject.estimate(lead, np.concatenate([e[:, :, None], reference], 2), trainings=draws)
                    for g, e in errors.items()
                }
                curves = {g: list(zip(map(float, points), line, strict=True)) for g, line in lines.items()}
                title = f"trained on {what} images: largest lead over the oracle's curve, dB"
                # An oracle is judged by nothing; what several of them lead each other by is chance, and belongs to the
                # reference.
                figures.append(Figure(f"lead_{what}", title, leads, Rule("above", self.options.margin), 2, curves))
            if ORIGINAL in lines and known:
                start = float(np.mean([lines[name][0] for name in known]))
                level = (start + lines[ORIGINAL][0]) / 2
                note = (
                    f"Back is a PSNR of {level:.1f} dB, half-way from the oracle's to the original's; "
                    f"{2 * points[-1]} stands for never."
                )
                title = f"trained on {what} images: steps until the forget images are back"
                steps = {
                    g: subject.estimate(
                        lambda rows, chosen, level=level: _steps(rows, chosen, points, level), e, trainings=draws
                    )
                    for g, e in errors.items()
                }
                figures.append(Figure(f"steps_{what}", title, steps, None, 0, note=note))
        return figures


def _lead(errors: np.ndarray, draws: np.ndarray) -> float:
    """By how many dB a curve is above the mean of the oracles' where it leads most, after the first step of training.

    errors: (images, points, 1 + oracles, draws), the curve first; draws: those that count, of training images.
    """
    errors = errors[..., draws].mean(3)
    curves = np.array(
        [[statistics.psnr(errors[:, point, one]) for one in range(errors.shape[2])] for point in range(errors.shape[1])]
    )
    return float((curves[1:, 0] - curves[1:, 1:].mean(1)).max())


def _steps(errors: np.ndarray, draws: np.ndarray, points: list[int], level: float) -> float:
    """The first point at which the PSNR reaches a level; twice the last where none does. errors: (images, points,
    draws)."""
    errors = errors[..., draws].mean(2)
    return float(
        next(
            (step for step, column in zip(points, errors.T, strict=True) if statistics.psnr(column) >= level),
            2 * points[-1],
        )
    )
