"""Figures of a trial by name, which of them a sweep wants smaller or larger, and which bounds it keeps.

SET.METRIC          of the trained model under the first view, as in metrics.json: forget.cosine, retain.fid, and
                    with evaluation.lpips_weights retain.lpips
SET[VIEW].METRIC    under another view: forget[random 0.5].cosine
FIGURE.drop, .rise  how much smaller, or larger, it is than the original's: retain.cosine.drop
FIGURE.to_oracle    how far it is from the oracle's, on either side: forget.cosine.to_oracle
cost.flops, cost.seconds, cost.steps    of the training
"""

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unlearn.config import RunConfig
from unlearn.errors import ConfigError

Figures = dict[str, float]
Direction = Literal["minimise", "maximise"]

SETS = ("forget", "retain")
METRICS = ("cosine", "psnr", "ssim", "lpips", "fid", "kid", "is")
DERIVED = ("drop", "rise", "to_oracle")
COSTS = ("cost.flops", "cost.seconds", "cost.steps")

_FIGURE = re.compile(
    rf"(?P<set>{'|'.join(SETS)})(\[(?P<view>[^\[\]]+)\])?\.(?P<metric>{'|'.join(METRICS)})(\.(?P<derived>{'|'.join(DERIVED)}))?"
)
_CONSTRAINT = re.compile(r"\s*(?P<figure>\S.*?)\s*(?P<sign><=|>=)\s*(?P<bound>\S+)\s*")


def check_name(name: str, settings: RunConfig, where: str) -> None:
    """Raise ConfigError where no trial of these settings can have a figure of that name."""
    if name in COSTS:
        return
    found = _FIGURE.fullmatch(name)
    if not found:
        raise ConfigError(
            f"{where}: no figure {name!r}; write SET.METRIC or SET[VIEW].METRIC with a set of {', '.join(SETS)} and a "
            f"metric of {', '.join(METRICS)}, perhaps with .{', .'.join(DERIVED)} behind it, or one of "
            f"{', '.join(COSTS)}"
        )
    views = [view.name for view in settings.evaluation.views]
    if found["view"] and found["view"] not in views:
        raise ConfigError(f"{where}: {name} names a view that is not measured; measured are: {', '.join(views)}")
    if found["metric"] == "lpips" and not settings.evaluation.lpips_weights:
        raise ConfigError(
            f"{where}: {name} needs evaluation.lpips_weights in the run: the network that compares images"
        )
    if found["derived"] == "to_oracle" and not settings.evaluation.oracle:
        raise ConfigError(
            f"{where}: {name} needs evaluation.oracle in the run: the weights of a model trained without the forget set"
        )


def of_document(document: Mapping[str, Any], generator: str) -> Figures:
    """The figures of one generator in a metrics.json; those under the first view have no view in their name. What could
    not be measured is left out."""
    figures = {}
    for row in document["rows"]:
        if row["generator"] != generator:
            continue
        names = [f"{row['set']}[{row['view']}]"] + ([row["set"]] if row["view"] == document["views"][0] else [])
        measured = ((metric, row.get(metric)) for metric in METRICS)
        values = {metric: float(value) for metric, value in measured if value is not None and math.isfinite(value)}
        figures |= {f"{name}.{metric}": value for name in names for metric, value in values.items()}
    return figures


def derived(figures: Figures, original: Figures, oracle: Figures) -> Figures:
    """`figures` with those that compare them with the original's and the oracle's, where there are such."""
    made = dict(figures)
    for name, value in figures.items():
        if name in original:
            made[f"{name}.drop"], made[f"{name}.rise"] = original[name] - value, value - original[name]
        if name in oracle:
            made[f"{name}.to_oracle"] = abs(value - oracle[name])
    return made


@dataclass(frozen=True)
class Objective:
    """A figure and the direction in which it is better."""

    figure: str
    direction: Direction

    def loss(self, figures: Mapping[str, float]) -> float:
        """The figure, so that smaller is better. Raises KeyError where the trial does not have it."""
        value = figures[self.figure]
        return value if self.direction == "minimise" else -value

    def __str__(self) -> str:
        return f"{self.direction} {self.figure}"


@dataclass(frozen=True)
class Constraint:
    """A bound on a figure, as in `retain.cosine.drop <= 0.01`."""

    figure: str
    sign: Literal["<=", ">="]
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Constraint":
        """Raises ConfigError."""
        found = _CONSTRAINT.fullmatch(text)
        try:
            if found:
                return cls(found["figure"], found["sign"], float(found["bound"]))  # pyright: ignore[reportArgumentType]
        except ValueError:
            pass
        raise ConfigError(f"{text!r} is no constraint: write FIGURE <= NUMBER or FIGURE >= NUMBER")

    def violation(self, figures: Mapping[str, float]) -> float:
        """By how much the bound is missed; 0 or less where it is kept, infinite where the figure is not there."""
        if self.figure not in figures:
            return math.inf
        value = figures[self.figure]
        return value - self.bound if self.sign == "<=" else self.bound - value

    def holds(self, figures: Mapping[str, float]) -> bool:
        over = operator.le if self.sign == "<=" else operator.ge
        return self.figure in figures and over(figures[self.figure], self.bound)

    def __str__(self) -> str:
        return f"{self.figure} {self.sign} {self.bound:g}"


def feasible(figures: Mapping[str, float], constraints: Iterable[Constraint]) -> bool:
    """Whether every bound is kept."""
    return all(constraint.holds(figures) for constraint in constraints)
