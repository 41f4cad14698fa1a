"""Membership inference: can a model's errors tell the forget images that it was trained on from others of the same
classes?

The score of an image is minus its mean error over K random views. A model that never saw either kind has an AUC of 0.5;
one far below it tells members too, by doing worse on them.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from unlearn import config
from unlearn.audit import shadows, statistics
from unlearn.audit.base import AuditTest, Figure, Measured, Piece, Rule
from unlearn.audit.bench import Bench
from unlearn.audit.subject import Subject
from unlearn.config import Part, Positive, ViewSpec

FEWEST = 4  # shadow models without which nothing is said by image
ENOUGH = 8  # shadows that have not seen an image, for a deviation of its own


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
    worst_margin: float = Field(
        default=0.1, gt=0, description="AUC of the worst decile: how far from the oracle's, or from 0.5"
    )


class Membership(AuditTest):
    """Members (forget images of training) against held-out images of the same classes, by reconstruction error."""

    name = "membership"
    title = "Membership inference"
    shows = (
        "Whether the model treats the very images that it was to forget otherwise than unseen images of the "
        "same classes."
    )
    hides = (
        "A model that does equally badly on the whole class passes, whatever it still knows of the class; and an "
        "original that has not learnt single images by heart cannot be told from one that never saw them."
    )
    cost = "views x images reconstructions"
    needs = ("forget", "forget_new")
    schema = 2
    Options = MembershipOptions
    options: MembershipOptions

    def pieces(self, subject: Subject) -> list[Piece]:
        return self.batches(subject, self.needs, subject.every)

    def measure(self, piece: Piece, bench: Bench) -> dict[str, np.ndarray]:
        specs: list[config.ViewSpec] = [self.options.view] * self.options.views
        errors = bench.errors if self.options.score == "reconstruction" else bench.losses
        return {"errors": errors(piece, specs), "kept": bench.pixels(piece.what, piece.start, piece.stop)[0]}

    def figures(self, measured: Measured, subject: Subject) -> list[Figure]:
        rows = subject.alike({name: measured[next(iter(subject.models)), name]["kept"] for name in self.needs})
        scores = {
            g: tuple(-measured[g, name]["errors"].mean(1)[rows[name]] for name in self.needs) for g in subject.models
        }
        if not all(len(each) for each in rows.values()):
            absent = "none of the held-out images has a class of the forget images"
            return [Figure("auc", "AUC", {}, Rule("apart", self.options.margin), absent=absent)]
        auc = {g: subject.estimate(statistics.auc, *each) for g, each in scores.items()}
        figures = [Figure("auc", "AUC", auc, Rule("apart", self.options.margin, known=0.5))]
        figures += self._found("tpr", "members found", scores, subject)
        if not subject.settings.shadows:
            return figures
        if (count := len(subject.shadows)) < FEWEST:
            absent = f"it takes {FEWEST} shadow models, and {subject.settings.shadows} has {count} from the first on"
            return [*figures, Figure("lr_auc", "by image: AUC", {}, Rule("apart", self.options.margin), absent=absent)]
        return figures + self._by_image(measured, subject, rows)

    def _found(
        self, name: str, title: str, scores: dict[str, tuple[np.ndarray, ...]], subject: Subject
    ) -> list[Figure]:
        """The share of members that is found where 1 % and 0.1 % of the others are taken for members. scores: of
        members and of the others, by generator."""
        figures = []
        for share, suffix in ((0.01, "1"), (0.001, "01")):
            few, others, known = round(1 / share), len(next(iter(scores.values()))[1]), {}
            absent = f"it takes {few} held-out images of the forgotten classes, and there are {others}"
            if others >= few:
                absent = ""
                known = {
                    g: subject.estimate(lambda m, r, share=share: statistics.tpr_at(m, r, share), *each)
                    for g, each in scores.items()
                }
            rule = Rule("above", self.options.tpr_margin, known=share)
            told = f"{title} at {share:.1%} false alarms"
            figures.append(Figure(f"{name}_{suffix}", told, known, rule, absent=absent))
        return figures

    def _by_image(self, measured: Measured, subject: Subject, rows: dict[str, np.ndarray]) -> list[Figure]:
        """The same with the difficulty of each image taken out of its score, by shadow models that have not seen it.
        rows: those of each set that are compared."""
        names = list(subject.shadows)
        kept = measured[names[0], "forget"]["kept"][rows["forget"]]
        seen, others = subject.seen[:, kept], len(rows["forget_new"])

        def scored(generator: str, kind: str) -> np.ndarray:
            return _score(measured[generator, kind]["errors"][rows[kind]])

        scores = [np.array([scored(name, kind) for name in names]) for kind in self.needs]
        # An image that none has seen is compared with one of each pair, as many as have not seen a member.
        absent = np.array([shadows.seen(others, number, subject.settings.seed) for number in range(len(names))])
        unseen = [~seen, absent]
        half = len(names) // 4 * 2  # pairs that say which images are learnt by heart; the others then judge them
        learnt = _mean(scores[0][:half], seen[:half]) - _mean(scores[0][:half], unseen[0][:half])
        worst = np.argsort(-learnt, kind="stable")[: max(1, len(learnt) // 10)]
        ratios, hardest, found = {}, {}, {}
        for generator in subject.models:
            own = [scored(generator, kind) for kind in self.needs]
            members, rest = _ratios(own, scores, unseen)
            ratios[generator] = subject.estimate(statistics.auc, members, rest)
            found[generator] = members, rest
            members, rest = _ratios(own, [s[half:] for s in scores], [u[half:] for u in unseen])
            hardest[generator] = subject.estimate(statistics.auc, members[worst], rest)
        note = (
            f"By image rests on {len(names)} shadow models; the worst decile are the images that half of them "
            "say are learnt by heart."
        )
        rule, margin = Rule("apart", self.options.margin, known=0.5), self.options.worst_margin
        return [
            Figure("lr_auc", "by image: AUC", ratios, rule, note=note),
            *self._found("lr_tpr", "by image: members found", found, subject),
            Figure("worst_auc", "by image, the worst decile: AUC", hardest, Rule("apart", margin, known=0.5)),
        ]


def _score(errors: np.ndarray) -> np.ndarray:
    """(N,) minus the logarithm of each image's error, which is nearly normal."""
    return -np.log(errors.mean(1).clip(1e-12))


def _mean(scores: np.ndarray, which: np.ndarray) -> np.ndarray:
    """(N,) mean of (shadows, N) scores over those of the shadows that `which` says; each image has some."""
    return np.where(which, scores, 0).sum(0) / which.sum(0)


def _ratios(
    score: Sequence[np.ndarray], scores: Sequence[np.ndarray], unseen: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Of members and of others, (N,) each: how far a score lies above those of shadows that have not seen the image, in
    their standard deviations.

    It grows with the likelihood ratio against "not seen" (the offline test of arXiv 2112.03570). With few shadows all
    images of both kinds share one deviation: with one for each kind, what a model has lost on both alike would tell
    them apart.
    """
    means = [_mean(s, u) for s, u in zip(scores, unseen, strict=True)]
    variances = [_mean((s - m) ** 2, u) for s, m, u in zip(scores, means, unseen, strict=True)]
    if min(u.sum(0).min() for u in unseen) < ENOUGH:
        shared = float(np.concatenate(variances).mean())
        variances = [np.full_like(each, shared) for each in variances]
    every = zip(score, means, variances, strict=True)
    return [(own - mean) / np.sqrt(variance.clip(1e-12)) for own, mean, variance in every]
