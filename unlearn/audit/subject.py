"""What is audited: the run, its generators, and the images of several kinds.

forget          forget images of training: what is to be forgotten
forget_new      held-out images of the same classes: no model has seen them
retain          retain images of training
retain_new      held-out images of the retained classes
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from unlearn import __version__, config
from unlearn.audit import shadows
from unlearn.audit.base import RULES, AuditTest, Piece, test_class
from unlearn.audit.settings import AuditConfig
from unlearn.audit.statistics import Estimate, bootstrap
from unlearn.data import classes, held_out, order, selection, shards
from unlearn.data.selection import RowSet
from unlearn.errors import ConfigError
from unlearn.evaluation import comparison, features
from unlearn.models import weights
from unlearn.models.weights import Source
from unlearn.run import Run

_ABSENT = {
    "forget": "data.forget names none",
    "forget_new": "held-out images of the forgotten classes (evaluation.data)",
    "retain": "retain images",
    "retain_new": "held-out images of the retained classes (evaluation.data)",
    "unseen": "images of unseen classes (`unseen`), or held-out images of the retained classes (evaluation.data)",
}


@dataclass(frozen=True)
class Subject:
    """run: what is audited. models: the generators by name. sets: the images by kind, those that there are. settings:
    of the audit. tests: those that are made, by name."""

    run: Run
    models: dict[str, config.Model]
    sets: dict[str, RowSet]
    settings: AuditConfig
    tests: dict[str, AuditTest]
    shadows: dict[str, config.Model] = field(default_factory=dict)
    # (shadows, images of "forget"): which shadow has seen which of them
    seen: np.ndarray = field(default_factory=lambda: np.empty((0, 0), bool))

    @property
    def every(self) -> dict[str, config.Model]:
        """Generators and shadow models."""
        return self.models | self.shadows

    def why(self, name: str) -> str:
        """What is missing where there is no set of that name."""
        return _ABSENT[name]

    def shuffled(self, name: str) -> np.ndarray:
        """Positions of a set's images in a random order: in that of the rows its parts would be of a class each."""
        rng = order.generator(self.settings.seed, 1 << 24, len(_ABSENT) + list(_ABSENT).index(name))
        return rng.permutation(len(self.sets[name]))

    def labels(self, name: str) -> np.ndarray:
        """(N,) labels of a set's images, those of other data by the numbers that their classes have in training, which
        are found by name; -1 where there is none, or where classes cannot be compared."""
        train, rows = self.sets["forget"].manifest, self.sets[name]
        if rows.manifest.hash == train.hash:
            return rows.labels
        known, made = np.unique(rows.labels), np.full(len(rows), -1)
        for label in known[known >= 0].tolist():
            try:
                number = classes.translated(label, rows.manifest, train, "evaluation.data")
            except ConfigError:
                number = -1
            # A class that training has not: a number that none of its classes has.
            made[rows.labels == label] = (1 << 32) + label if number is None else number
        return made

    @property
    def same_classes(self) -> bool:
        """Whether held-out images of forgotten and of retained classes are the same images, as where images were chosen
        by ids: their classes then say nothing of what was forgotten."""
        if "forget_new" not in self.sets or "retain_new" not in self.sets:
            return False
        new, kept = (self.sets[name] for name in ("forget_new", "retain_new"))
        return new.manifest.hash == kept.manifest.hash and bool(np.isin(new.rows, kept.rows).any())

    def source(self, generator: str) -> Source:
        """What the storage says of the weights of a generator."""
        return self.run.sources[self.every[generator].weights or ""]

    @cached_property
    def network(self) -> str:
        """sha256 of the weights of the feature network. Raises UnlearnError."""
        evaluation = self.run.settings.evaluation
        return weights.locate(features.file(evaluation.features, evaluation.features_weights)).fingerprint

    def alike(self, kept: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"forget", "forget_new"}: of the images that are left of each, those to compare one by one, as numbers from
        0.

        kept: their positions in the sets. All of them where the forget set is of whole classes. Where single images
        were chosen, held-out ones are drawn with the forget set's shares of classes: a class that is harder than
        another would else tell the two apart.
        """
        every = {name: np.arange(len(positions)) for name, positions in kept.items()}
        chosen = self.run.settings.data.forget
        if chosen is None or chosen.classes is not None or chosen.exclude_classes is not None:
            return every
        mine, others = (self.labels(name)[kept[name]] for name in ("forget", "forget_new"))
        if (mine < 0).all():  # there are no classes
            return every
        found, counts = np.unique(mine[np.isin(mine, others)], return_counts=True)
        if not len(found):
            return {name: rows[:0] for name, rows in every.items()}
        there = np.array([(others == label).sum() for label in found])
        times = (there / counts).min()
        wanted = np.maximum(counts * (np.floor(times) if times >= 1 else times), 1).astype(int)
        rng = order.generator(self.settings.seed, 1 << 24, 2 * len(_ABSENT))
        drawn = [rng.permutation(np.flatnonzero(others == n))[:w] for n, w in zip(found, wanted, strict=True)]
        return {"forget": np.flatnonzero(np.isin(mine, found)), "forget_new": np.sort(np.concatenate(drawn))}

    def estimate(self, statistic: Any, *samples: np.ndarray, trainings: int | None = None) -> Estimate:
        """statistic(*samples) with its bootstrap draws; rows are images. trainings: their number, where the statistic
        takes numbers of trainings behind the samples."""
        settings = self.settings
        return bootstrap(statistic, *samples, resamples=settings.resamples, seed=settings.seed, trainings=trainings)

    def key(self, piece: Piece) -> str:
        """The hash of everything that a piece's result depends on."""
        test, evaluation = self.tests[piece.test], self.run.settings.evaluation
        told = {
            "schema": test.schema, "piece": [piece.test, piece.what, piece.start, piece.stop],
            "seed": self.settings.seed,
            "options": test.options.model_dump(mode="json"),
            "weights": [self.source(name).fingerprint for name in (piece.generator, "original") if name in self.every],
            "model": self.every[piece.generator].model_dump(mode="json", exclude={"weights", "first_stage"}),
            "first_stage": self.run.origin.get("first_stage"),
            "sets": {name: rows.digest for name, rows in self.sets.items()},
            "features": [evaluation.features, evaluation.features_weights, evaluation.resize,
                evaluation.guidance_scale],
            "orientation": self.run.settings.data.orientation, "run": test.reads(self, piece),
            "on_their_side": self.settings.unseen is None,
        }  # fmt: skip
        return _hash(told)

    def identity(self) -> str:
        """The hash of everything that the figures of the audit and its verdicts depend on: of two equal ones one need
        not be made."""
        pieces = [piece for test in self.tests.values() if not test.missing(self) for piece in test.pieces(self)]
        settings = self.settings.model_dump(mode="json", exclude={"workers"})
        audited = {name: self.source(name).fingerprint for name in self.models}
        return _hash([__version__, RULES, settings, audited, [self.key(piece) for piece in pieces]])


def subject(run: Run, models: dict[str, config.Model], settings: AuditConfig) -> Subject:
    """The subject of an audit of these models, all weights looked up. Raises UnlearnError."""
    tests = {name: test_class(name)(getattr(settings, name)) for name in settings.tests}
    known, seen = {}, np.empty((0, 0), bool)
    if settings.shadows and "forget" in run.sets:
        forget = run.sets["forget"]
        known, seed = shadows.found(settings.shadows, run.settings.model, forget)
        kept = _drawn(forget, settings, 0)
        seen = np.array([shadows.seen(len(forget), number, seed)[kept] for number in range(len(known))])
    run = comparison.located(run, models | known)
    comparison.warn_of_others(run, models)
    return Subject(run, models, _sets(run, settings), settings, tests, known, seen)


def _sets(run: Run, settings: AuditConfig) -> dict[str, RowSet]:
    new = held_out.of_classes(run.settings, run.sets)
    found = {"forget": run.sets.get("forget"), "forget_new": new.get("forget"), "retain": run.sets["retain"],
             "retain_new": new.get("retain")}  # fmt: skip
    if settings.unseen:
        found["unseen"] = _unseen(settings.unseen, settings.seed, run.sets["retain"].manifest)
    else:
        found["unseen"] = found["retain_new"]
    return {
        name: _limited(rows, settings, number)
        for number, (name, rows) in enumerate(found.items())
        if rows is not None and len(rows)
    }


def _unseen(uri: str, seed: int, train: shards.Manifest) -> RowSet:
    """The images of `unseen` whose classes training has not. Raises ConfigError where there are none."""
    rows = selection.select(shards.load(uri), config.Rows(), seed, "unseen")
    if not (train.classes and rows.manifest.classes):  # nothing to compare by
        return rows
    known = [label for label, name in enumerate(rows.manifest.classes) if name in train.classes]
    new = ~np.isin(rows.labels, known)
    if not new.any():
        raise ConfigError(
            f"unseen: {rows.manifest.uri} has only classes that are in training data too: name images of others"
        )
    return replace(rows, rows=rows.rows[new], labels=rows.labels[new])


def _drawn(rows: RowSet, settings: AuditConfig, number: int) -> np.ndarray:
    """Positions of `limit` rows of set `number`, drawn with the seed."""
    if len(rows) <= settings.limit:
        return np.arange(len(rows))
    return np.sort(order.generator(settings.seed, 1 << 24, number).permutation(len(rows))[: settings.limit])


def _limited(rows: RowSet, settings: AuditConfig, number: int) -> RowSet:
    index = _drawn(rows, settings, number)
    return replace(rows, rows=rows.rows[index], labels=rows.labels[index])


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
