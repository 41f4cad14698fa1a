"""What is audited: the run, its generators, and the images of four kinds.

forget          forget images of training: what is to be forgotten
forget_new      held-out images of the same classes: no model has seen them
retain          retain images of training
retain_new      held-out images of the retained classes
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unlearn import config
from unlearn.audit.base import AuditTest, Piece, test_class
from unlearn.audit.settings import AuditConfig
from unlearn.audit.statistics import Estimate, bootstrap
from unlearn.data import held_out, order
from unlearn.data.selection import RowSet
from unlearn.models.weights import Source
from unlearn.run import Run

SCHEMA = 1  # raised when a test measures otherwise than before under the same options
_ABSENT = {
    "forget": "data.forget names none",
    "forget_new": "held-out images of the forgotten classes (evaluation.data)",
    "retain": "retain images",
    "retain_new": "held-out images of the retained classes (evaluation.data)",
}


@dataclass(frozen=True)
class Subject:
    """run: what is audited. models: the generators by name. sets: the images by kind, those that there are. settings: of the
    audit. tests: those that are made, by name."""

    run: Run
    models: dict[str, config.Model]
    sets: dict[str, RowSet]
    settings: AuditConfig
    tests: dict[str, AuditTest]

    def why(self, name: str) -> str:
        """What is missing where there is no set of that name."""
        return _ABSENT[name]

    def source(self, generator: str) -> Source:
        """What the storage says of the weights of a generator."""
        return self.run.sources[self.models[generator].weights or ""]

    def estimate(self, statistic: Any, *samples: np.ndarray) -> Estimate:
        """statistic(*samples) with its bootstrap draws; rows are images."""
        return bootstrap(statistic, *samples, resamples=self.settings.resamples, seed=self.settings.seed)

    def key(self, piece: Piece) -> str:
        """The hash of everything that a piece's result depends on."""
        test, evaluation = self.tests[piece.test], self.run.settings.evaluation
        told = {
            "schema": SCHEMA, "piece": [piece.test, piece.what, piece.start, piece.stop], "seed": self.settings.seed,
            "options": test.options.model_dump(mode="json"),
            "weights": [self.source(name).fingerprint for name in (piece.generator, "original") if name in self.models],
            "model": self.models[piece.generator].model_dump(mode="json", exclude={"weights", "first_stage"}),
            "first_stage": self.run.origin.get("first_stage"),
            "sets": {name: _digest(rows) for name, rows in self.sets.items()}, "shadows": self.settings.shadows,
            "features": [evaluation.features, evaluation.features_weights, evaluation.resize, evaluation.guidance_scale],
            "orientation": self.run.settings.data.orientation,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def subject(run: Run, models: dict[str, config.Model], settings: AuditConfig) -> Subject:
    """The subject of an audit; run knows the weights of the models already. Raises ConfigError."""
    tests = {name: test_class(name)(getattr(settings, name)) for name in settings.tests}
    return Subject(run, models, _sets(run, settings), settings, tests)


def _sets(run: Run, settings: AuditConfig) -> dict[str, RowSet]:
    new = held_out.of_classes(run.settings, run.sets)
    found = {"forget": run.sets.get("forget"), "forget_new": new.get("forget"), "retain": run.sets["retain"],
             "retain_new": new.get("retain")}  # fmt: skip
    return {
        name: _limited(rows, settings.limit, settings.seed, number)
        for number, (name, rows) in enumerate(found.items())
        if rows is not None and len(rows)
    }


def _limited(rows: RowSet, limit: int, seed: int, number: int) -> RowSet:
    if len(rows) <= limit:
        return rows
    index = np.sort(order.generator(seed, 1 << 24, number).permutation(len(rows))[:limit])
    return replace(rows, rows=rows.rows[index], labels=rows.labels[index])


def _digest(rows: RowSet) -> str:
    return hashlib.sha256(rows.manifest.hash.encode() + rows.rows.astype("<i8").tobytes()).hexdigest()
