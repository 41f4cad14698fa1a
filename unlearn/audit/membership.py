"""Membership inference: can a model's errors tell the forget images that it was trained on from others of the same classes?

The score of an image is minus its mean error over K random views. A model that never saw either kind has an AUC of 0.5; one far
below it tells members too, by doing worse on them.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from unlearn import config
from unlearn.audit import statistics
from unlearn.audit.base import AuditTest, Figure, Measured, Piece, Rule
from unlearn.audit.bench import Bench
from unlearn.audit.subject import Subject
from unlearn.config import Part, Positive, ViewSpec


class MembershipOptions(Part):
    """Of membership inference."""

    views: Positive = Field(default=8, description="random views of each image, over which its error is averaged")
    view: ViewSpec = Field(default=ViewSpec(kind="random", size=0.5), description="what is hidden")
    score: Literal["reconstruction", "training_loss"] = Field(
        default="reconstruction",
        description="training_loss: the loss of the family, row by row; cheaper where an image must be sampled",
    )
    margin: float = Field(default=0.05, gt=0, description="AUC: how far from the oracle's, or from 0.5, it may be")
    tpr_margin: float = Field(default=0.05, gt=0, description="share of members found at 1 % false alarms: likewise")


class Membership(AuditTest):
    """Members (forget images of training) against held-out images of the same classes, by reconstruction error."""

    name = "membership"
    title = "Membership inference"
    shows = "Whether the model treats the very images that it was to forget otherwise than unseen images of the same classes."
    hides = (
        "A model that does equally badly on the whole class passes, whatever it still knows of the class; and an original that has "
        "not learnt single images by heart cannot be told from one that never saw them."
    )
    cost = "views x images reconstructions"
    needs = ("forget", "forget_new")
    Options = MembershipOptions
    options: MembershipOptions

    def pieces(self, subject: Subject) -> list[Piece]:
        return self.batches(subject, self.needs)

    def measure(self, piece: Piece, bench: Bench) -> dict[str, np.ndarray]:
        specs: list[config.ViewSpec] = [self.options.view] * self.options.views
        errors = bench.errors if self.options.score == "reconstruction" else bench.losses
        return {"errors": errors(piece, specs)}

    def figures(self, measured: Measured, subject: Subject) -> list[Figure]:
        auc, found = {}, {share: {} for share in (0.01, 0.001)}
        others = len(subject.sets["forget_new"])
        for generator in subject.models:
            scores = [-measured[generator, name]["errors"].mean(1) for name in self.needs]
            auc[generator] = subject.estimate(statistics.auc, *scores)
            for share in found:
                if others * share >= 1:
                    found[share][generator] = subject.estimate(
                        lambda members, rest, share=share: statistics.tpr_at(members, rest, share), *scores
                    )
        figures = [Figure("auc", "AUC", auc, Rule("apart", self.options.margin, known=0.5))]
        for share, name in ((0.01, "tpr_1"), (0.001, "tpr_01")):
            if found[share]:
                rule = Rule("above", self.options.tpr_margin, known=share)
                figures.append(Figure(name, f"members found at {share:.1%} false alarms", found[share], rule))
        return figures
