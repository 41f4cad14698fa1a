"""The drawings of each objective over each parameter while all others stay."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from unlearn.search import ablation, means, study
from unlearn.search.chart import COLOURS, SYMBOLS, Chart, module, safe
from unlearn.search.objectives import Objective
from unlearn.search.records import Point

if TYPE_CHECKING:
    import plotly.graph_objects as go


def ablations(points: Sequence[Point], objectives: Sequence[Objective]) -> Iterator[Chart]:
    """Each objective over each parameter while all others stay, a curve for each of their values; on held-out images
    where all points were measured there."""
    held_out = means.all_held_out(points)
    points = held_out or points
    where = "On held-out images. " if held_out else "On the images that were searched with. "
    names = study.labels(key for point in points for key in point.parameters)
    for key in ablation.parameters(points):
        for objective in objectives:
            drawn = ablation.curves(points, key, objective.figure)
            if not drawn:
                continue
            figure = module().Figure()
            for curve, colour, symbol in zip(drawn, COLOURS, SYMBOLS, strict=False):  # no more than ablation.MOST
                _curve(figure, curve, colour, symbol, alone=len(drawn) == 1)
            numbers = [at.x for curve in drawn for at in curve.at]
            if not all(study.is_number(x) for x in numbers):
                figure.update_xaxes(type="category")
            elif study.is_log(numbers):
                figure.update_xaxes(
                    type="log", tickvals=sorted(set(numbers)), ticktext=[f"{x:g}" for x in sorted(set(numbers))]
                )
            values = [value for curve in drawn for at in curve.at for value in at.values]
            room = max(max(values) - min(values), 1e-9)  # beyond it: the interval of two trials would fill any axis
            figure.update_yaxes(range=[min(values) - 0.75 * room, max(values) + 0.75 * room])
            figure.update_layout(height=340, xaxis_title=key, yaxis_title=objective.figure)
            yield Chart(
                f"ablation-{key}-{objective.figure}", f"{objective.figure} over {names[key]}",
                f"{where}Mean, each trial as a dot, and the 95 % interval of the mean over the trials (Student's t; "
                "cut where the trials are few and it is far wider than they are).",
                figure, wide=False,
            )  # fmt: skip


def _curve(figure: "go.Figure", curve: ablation.Curve, colour: str, symbol: str, alone: bool) -> None:
    xs = [at.x if study.is_number(at.x) else study.text(at.x) for at in curve.at]
    name = curve.fixed or "mean"
    banded = [(x, at.interval) for x, at in zip(xs, curve.at, strict=True) if at.interval]
    if banded:
        figure.add_scatter(
            x=[x for x, _ in banded] + [x for x, _ in reversed(banded)],
            y=[high for _, (_, high) in banded] + [low for _, (low, _) in reversed(banded)],
            fill="toself", fillcolor=colour, opacity=0.16, mode="none", hoverinfo="skip", showlegend=False,
            legendgroup=name,
        )  # fmt: skip
    each = [(x, value) for x, at in zip(xs, curve.at, strict=True) for value in at.values if len(at.values) > 1]
    figure.add_scatter(
        x=[x for x, _ in each], y=[value for _, value in each], mode="markers", marker={"color": colour, "size": 4},
        opacity=0.55, hoverinfo="skip", showlegend=False, legendgroup=name,
    )  # fmt: skip
    figure.add_scatter(
        x=xs, y=[at.mean for at in curve.at], mode="lines+markers", line={"color": colour, "width": 2},
        marker={"color": colour, "symbol": symbol, "size": 8}, name=name, legendgroup=name, showlegend=not alone,
        customdata=[at.point for at in curve.at],
        hovertext=[
            f"<b>{at.point}</b>, {safe(name)}<br>{safe(str(x))}: {at.mean:.4g}" for x, at in zip(xs, curve.at,
                strict=True)
        ],
        hoverinfo="text",
    )  # fmt: skip
