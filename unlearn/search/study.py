"""The points of a sweep as a study of Optuna, whatever chose them: grid, random or a searcher of Optuna's own."""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from unlearn.errors import MissingExtra
from unlearn.search.objectives import Constraint, Objective
from unlearn.search.records import Point

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

FEWEST = 8  # points below which no importance is told
BEST = 0.25  # share of the points that are compared with all; a tenth, as usual, would be two of sixteen


@contextlib.contextmanager
def optuna(purpose: str) -> Iterator[Any]:
    """The module, silent within the block. Raises MissingExtra."""
    try:
        import optuna as module
    except ImportError:
        raise MissingExtra("optuna", "sweep", purpose) from None
    level = module.logging.get_verbosity()
    module.logging.set_verbosity(module.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield module
    finally:
        module.logging.set_verbosity(level)


def study(
    points: Sequence[Point],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint] = (),
    losses: bool = False,
) -> "Study":
    """A study in memory with a trial for each point that is complete and has every objective; parameters by their
    labels.

    losses: the objectives as `Objective.loss` gives them, all to be minimised, in place of the figures. Raises
    MissingExtra.
    """
    with optuna("a study of the sweep") as module:
        kept = [point for point in points if point.complete and all(o.figure in point.mean for o in objectives)]
        directions = ["minimize" if losses or o.direction == "minimise" else "maximize" for o in objectives]
        made = module.create_study(directions=directions)
        made.set_metric_names([objective.figure for objective in objectives])
        names, domains = labels(key for point in points for key in point.parameters), distributions(kept)
        for point in kept:
            given = point.parameters
            bounds = {str(one): min(one.violation(point.mean), 1e300) for one in constraints}
            made.add_trial(module.trial.create_trial(
                values=[o.loss(point.mean) if losses else point.mean[o.figure] for o in objectives],
                params={names[key]: value if domains[key][1] else text(value) for key, value in given.items()},
                distributions={names[key]: domains[key][0] for key in given}, constraints=bounds or None,
                user_attrs={"point": point.id},
            ))  # fmt: skip
        return made


def importances(points: Sequence[Point], objectives: Sequence[Objective]) -> dict[str, dict[str, float]]:
    """{objective, or "the front": {label of a parameter: its share of the importance}} by PED-ANOVA: how much the
    values of the best quarter of the points differ from those of all. Empty for fewer than eight points. Raises
    MissingExtra."""
    # As losses: PED-ANOVA takes the lowest values of a target for the best, whatever the direction of the objective.
    made = study(points, objectives, losses=True)
    if len(made.trials) < FEWEST:
        return {}
    with optuna("the importance of parameters") as module:
        evaluator = module.importance.PedAnovaImportanceEvaluator(target_quantile=BEST)

        def told(target) -> dict[str, float]:
            return module.importance.get_param_importances(made, evaluator=evaluator, target=target)

        shares = {objective.figure: told(lambda trial, i=i: trial.values[i]) for i, objective in enumerate(objectives)}
        return shares | ({"the front": told(None)} if len(objectives) > 1 else {})


def distributions(points: Sequence[Point]) -> dict[str, tuple["BaseDistribution", bool]]:
    """{key: (the range or the choices that the points have of it, whether it is a number)}."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, tuple[BaseDistribution, bool]] = {}
    for key in dict.fromkeys(key for point in points for key in point.parameters):
        values = [point.parameters[key] for point in points if key in point.parameters]
        if not all(is_number(value) for value in values):
            choices = tuple(dict.fromkeys(text(value) for value in values))
            made[key] = CategoricalDistribution(choices), False
            continue
        kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
        made[key] = kind(min(values), max(values), log=is_log(values)), True
    return made


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_log(values: Sequence[float]) -> bool:
    """Whether these are spread over more than a power of ten, so that ratios say more than differences."""
    return min(values) > 0 and max(values) > 10 * min(values)


def text(value: Any, width: int = 40) -> str:
    """A value as it stands in a configuration, on one line; a long one is cut, and told from others by a part of its
    hash. Four digits of a float are enough to be read."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and value and all(isinstance(inner, float) for inner in value.values()):
        return ", ".join(f"{key}: {text(inner)}" for key, inner in value.items())
    line = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    return line if len(line) <= width else f"{line[: width - 7]}… {hashlib.sha256(line.encode()).hexdigest()[:4]}"


def labels(keys: Any) -> dict[str, str]:
    """{key: the shortest end of it that no other key has}: alpha for method.alpha."""
    known = list(dict.fromkeys(keys))

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    made = {}
    for key in known:
        sizes = range(1, key.count(".") + 2)
        made[key] = next((
            short for parts in sizes
            if sum(ending(other, parts) == (short := ending(key, parts)) for other in known) == 1
        ), key)  # fmt: skip
    return made
