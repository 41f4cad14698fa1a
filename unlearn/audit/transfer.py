"""Transfer: does forgetting reach what unlearning has not seen, and does it spare what is near?"""

from typing import Any

import numpy as np
from pydantic import Field

from unlearn.audit import statistics
from unlearn.audit.base import ORIGINAL, UNLEARNED, AuditTest, Figure, Measured, Piece, Rule
from unlearn.audit.bench import Bench
from unlearn.audit.subject import Subject
from unlearn.config import Part, ViewSpec

NEARLY = 1 / 16  # sizes of holes that differ by no more may be as many patches
NEAR = "near:"  # pieces that embed a set


class TransferOptions(Part):
    """Of transfer."""

    view: ViewSpec = Field(default=ViewSpec(size=0.5), description="under which unseen images and bystanders are seen")
    views: list[ViewSpec] = Field(
        default_factory=lambda: [ViewSpec(kind="outpaint", size=0.5), ViewSpec(kind="brush", size=0.5),
            ViewSpec(size=0.75)],
        min_length=1, description="views that unlearning did not use; those that it used (train_views) are left out",
    )  # fmt: skip
    bystanders: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="share of the retained images, those nearest to the forget set; ten at least",
    )
    margin: float = Field(default=1.0, gt=0, description="dB that forget images may be above the oracle")
    beyond: float = Field(
        default=3.0,
        gt=0,
        description="dB that they may be below it: so badly paints no model that never saw them, which gives them away",
    )
    damage: float = Field(default=1.0, gt=0, description="dB that bystanders may lose against the original")


class Transfer(AuditTest):
    """Forget images under other views, other images of the forgotten classes, and neighbours that were to stay."""

    name = "transfer"
    title = "Transfer"
    shows = (
        "Whether forgetting holds under other views and for images that unlearning has not seen, whether it goes no "
        "further than a model that never saw them, and what it costs the neighbours of the forget set."
    )
    hides = "It looks at outputs as they come: what is hidden inside the model, it does not see."
    cost = "some views x images reconstructions"
    needs = ("forget", "forget_new", "retain_new")
    Options = TransferOptions
    options: TransferOptions

    def new_views(self, subject: Subject) -> list[ViewSpec]:
        """Those of `views` that unlearning cannot have drawn."""
        used = subject.run.settings.train_views
        return [view for view in self.options.views if not any(_holds(one, view) for one in used)]

    def reads(self, subject: Subject, piece: Piece) -> list[Any]:
        return [view.model_dump(mode="json") for view in self.new_views(subject)]

    def pieces(self, subject: Subject) -> list[Piece]:
        embedder = ORIGINAL if ORIGINAL in subject.models else UNLEARNED
        near = [
            Piece(self.name, piece.generator, NEAR + piece.what, piece.start, piece.stop)
            for piece in self.batches(subject, ("forget", "retain_new"), [embedder])
        ]
        sets = [name for name in self.needs if name != "forget" or self.new_views(subject)]
        return near + self.batches(subject, sets)

    def measure(self, piece: Piece, bench: Bench) -> dict[str, np.ndarray]:
        if piece.what.startswith(NEAR):
            plain = Piece(piece.test, piece.generator, piece.what.removeprefix(NEAR), piece.start, piece.stop)
            return {"embeddings": bench.embeddings(plain, self.options.view)}
        specs = self.new_views(bench.subject) if piece.what == "forget" else [self.options.view]
        return {"errors": bench.errors(piece, specs)}

    def figures(self, measured: Measured, subject: Subject) -> list[Figure]:
        embedder = ORIGINAL if ORIGINAL in subject.models else UNLEARNED
        forget, retain = (measured[embedder, NEAR + name]["embeddings"] for name in ("forget", "retain_new"))
        count = max(statistics.FEW, round(self.options.bystanders * len(retain)))
        nearest = np.argsort(-_closest(retain, forget), kind="stable")[:count]

        def by_generator(name: str, rows: np.ndarray | slice = slice(None)) -> dict[str, statistics.Estimate]:
            return {
                g: subject.estimate(statistics.psnr, measured[g, name]["errors"].mean(1)[rows]) for g in subject.models
            }

        trace = Rule("above", self.options.margin)
        damage = Rule("below", self.options.damage, against="original", power=False)
        beyond = Rule("below", self.options.beyond, power=False)
        unseen = by_generator("forget_new")
        views, title = self.new_views(subject), "forget images, new views: PSNR, dB"
        left_out = [view.name for view in self.options.views if view not in views]
        note = f"Not asked, since unlearning used them: {', '.join(left_out)}." if left_out and views else ""
        absent = "" if views else "unlearning used all of these views (transfer.views)"
        return [
            Figure("views", title, by_generator("forget") if views else {}, trace, 2, note=note, absent=absent),
            Figure("images", "new images of the forgotten classes: PSNR, dB", unseen, trace, 2),
            Figure("beyond", "the same, which may not be far below the oracle either", unseen, beyond, 2),
            Figure("bystanders", "bystanders: PSNR, dB", by_generator("retain_new", nearest), damage, 2),
            Figure("retain", "all retained classes: PSNR, dB", by_generator("retain_new"), None, 2),
        ]


def _holds(used: ViewSpec, view: ViewSpec) -> bool:
    """Whether a view may have been drawn from another, or hides nearly the same: of its kind, where a box may lie in
    the centre, and of a size that it has or that may come to as many patches."""
    (low, high), (least, most) = (x.size if isinstance(x.size, tuple) else (x.size, x.size) for x in (used, view))
    same = used.kind == view.kind or (used.kind, view.kind) == ("box", "centre")
    return same and low - NEARLY <= most and least <= high + NEARLY


def _closest(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) the largest cosine of each of N vectors to any of the others."""
    mean = others.mean(0)  # embeddings have much in common that tells nothing

    def unit(x: np.ndarray) -> np.ndarray:
        x = x - mean
        return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)

    return (unit(vectors) @ unit(others).T).max(1)
