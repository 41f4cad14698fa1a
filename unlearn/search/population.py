"""Who goes on from whom behind a stage of a population, and with which learning rate: a function of the records."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unlearn.search.domain import Domain
from unlearn.search.records import Figures, Point
from unlearn.search.space import Parameters, Sweep

LR, CHANGES = "training.lr", "training.lr_changes"
ORIGIN = "from"  # in a stage of a record: the point whose checkpoint the trial went on from behind it

SHARE = 0.25  # of the points are replaced behind a stage, by as many of the best
FACTORS = (0.8, 1.2)  # of a learning rate, where it is not drawn anew
ANEW = 0.25  # how often it is


@dataclass(frozen=True)
class Heir:
    """A point that goes on from the checkpoint of another. lr: from now on; parameters: its own then."""

    point: str
    donor: str
    lr: float
    parameters: Parameters


def heirs(sweep: Sweep, points: Sequence[Point], stage: int) -> Iterator[Heir]:
    """The worst of these points behind a stage, each with one of the best. What breaks a constraint is worse than
    anything that keeps them; of what breaks them, what breaks them by more."""
    ranked = sorted(points, key=lambda point: (*_loss(sweep, point, stage), point.id))
    count = min(math.ceil(len(ranked) * SHARE), len(ranked) // 2)
    for point in ranked[len(ranked) - count :]:
        rng = random.Random(f"{sweep.search_seed}/{stage}/{point.id}")
        donor = rng.choice(ranked[:count])
        changes = dict(donor.parameters.get(CHANGES, {}))
        newest = changes[max(changes, key=int)] if changes else donor.parameters[LR]
        lr = explored(sweep.search[LR], newest, rng)
        step = str(point.trials[0].stages[stage]["step"])
        yield Heir(point.id, donor.id, lr, {LR: donor.parameters[LR], CHANGES: changes | {step: lr}})


def explored(domain: Domain, lr: float, rng: random.Random) -> float:
    """A learning rate near this one, or drawn anew; within the range that is searched."""
    assert domain.ends, "the learning rate is searched in a range"
    low, high = domain.ends
    return domain.draw(rng) if rng.random() < ANEW else min(max(lr * rng.choice(FACTORS), low), high)


def _loss(sweep: Sweep, point: Point, stage: int) -> tuple[float, float]:
    each: list[Figures] = [trial.stages[stage]["figures"] for trial in point.trials]
    names = set.intersection(*map(set, each))
    means = {name: math.fsum(figures[name] for figures in each) / len(each) for name in names}
    broken = math.fsum(max(0.0, bound.violation(means)) for bound in sweep.bounds)
    objective = sweep.wanted[0]
    return broken, objective.loss(means) if objective.figure in means else math.inf
