"""The drawings of a sweep's page, as figures of plotly; those of Optuna where it has one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unlearn.search import ablation_charts, front, front_charts, study
from unlearn.search.chart import COLOURS, FRONT, LINE, OTHER, Chart, module, safe
from unlearn.search.objectives import Constraint, Objective
from unlearn.search.records import Point


def charts(
    points: Sequence[Point], objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> dict[str, list[Chart]]:
    """The drawings that these points give: "fronts", what is "searched", and "ablations". Points are in the order in
    which they ended. Raises MissingExtra."""
    searched = [
        _volume(points, objectives, constraints),
        _importances(points, objectives),
        _parallel(points, objectives, constraints),
    ]
    return {
        "fronts": list(front_charts.fronts(points, objectives)),
        "searched": [chart for chart in searched if chart],
        "ablations": list(ablation_charts.ablations(points, objectives)),
    }


def _volume(
    points: Sequence[Point], objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> Chart | None:
    """The volume behind the front, or the best value, after each point."""
    losses, counted = front.table(points, objectives)
    if not counted.any():
        return None
    from optuna import visualization

    made = study.study(points, objectives, constraints)
    if len(objectives) == 1:
        figure = visualization.plot_optimization_history(made)
        figure.update_layout(height=320, xaxis_title="points", yaxis_title=objectives[0].figure)
        return Chart("volume", "The best point so far", "", figure, wide=False)
    signs = np.array([1.0 if objective.direction == "minimise" else -1.0 for objective in objectives])
    reference = front.reference(losses, counted)
    with study.optuna("the page of a sweep"):
        figure = visualization.plot_hypervolume_history(made, list(signs * reference))
    figure.update_traces(
        x=list(range(1, len(made.trials) + 1)), line={"color": LINE, "shape": "hv"}, marker={"color": LINE, "size": 5}
    )
    figure.update_layout(
        height=320, yaxis_rangemode="tozero", xaxis_title="points, as they ended", yaxis_title="hypervolume"
    )
    at = ", ".join(f"{o.figure} {s * r:.3g}" for o, s, r in zip(objectives, signs, reference, strict=True))
    return Chart("volume", "Hypervolume", f"What the front dominates, measured from {at}.", figure, wide=False)


def _parallel(
    points: Sequence[Point], objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> Chart | None:
    made = study.study(points, objectives, constraints)
    if len(made.trials) < 2 or not any(trial.params for trial in made.trials):
        return None
    from optuna import visualization

    with study.optuna("the page of a sweep"):
        figure: Any = visualization.plot_parallel_coordinate(made)
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.x[0] is not None]
    if len(objectives) > 1:  # drawn by rank, the front last
        best = lines[-1].line.color
        for trace in lines:
            ahead = trace.line.color == best
            trace.line.color, trace.line.width, trace.opacity = (FRONT, 2, 0.9) if ahead else (OTHER, 1, 0.45)
        figure.data = lines
    dimensions = len(objectives) + len({name for trial in made.trials for name in trial.params})
    figure.update_annotations(font_color=OTHER)
    figure.update_layout(height=420, margin={"l": 44, "r": 44, "t": 16})
    caption = "A line a point" + (", those that no other one dominates in colour" if len(objectives) > 1 else "")
    return Chart(
        "parallel",
        "Parallel coordinates",
        f"{caption}{'; dotted: a bound is broken' if constraints else ''}.",
        figure,
        narrowest=130 * dimensions,
    )


def _importances(points: Sequence[Point], objectives: Sequence[Objective]) -> Chart | None:
    shares = study.importances(points, objectives)
    if not shares or len(next(iter(shares.values()))) < 2:
        return None
    figure = module().Figure()
    order = list(reversed(next(reversed(shares.values()))))
    for (target, of), colour in zip(shares.items(), COLOURS, strict=False):
        figure.add_bar(
            x=[of[name] for name in order], y=order, orientation="h", name=target, marker={"color": colour},
            hovertemplate="%{y}: %{x:.0%}<extra>" + safe(target) + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        height=max(260, 120 + 30 * len(order) * len(shares)), xaxis={"tickformat": ".0%", "range": [0, 1]}
    )
    caption = (
        f"PED-ANOVA: how much the parameters of the best {study.BEST:.0%} of the points differ from those of all. It "
        "ranks parameters; with few points it is rough."
    )
    return Chart("importance", "Importance of parameters", caption, figure, wide=False)
