"""The drawings of a sweep's front: each objective against the first."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from unlearn.search import front, means
from unlearn.search.chart import FRONT, INK, LINE, ORACLE, OTHER, Chart, hover, module
from unlearn.search.objectives import Objective
from unlearn.search.records import Point

if TYPE_CHECKING:
    import plotly.graph_objects as go


def fronts(points: Sequence[Point], objectives: Sequence[Objective]) -> Iterator[Chart]:
    """The first objective upwards, against each other one. What every point has to be compared with is marked."""
    if len(objectives) < 2:
        return
    best = {point.id for point in front.of_points(points, objectives)}
    for number, other in enumerate(objectives[1:]):
        axes = other, objectives[0]
        figure = module().Figure()
        known = [point for point in points if all(objective.figure in point.mean for objective in axes)]
        fit = [p for p in known if p.feasible and p.complete]
        kinds = {
            "front": ("Pareto front", FRONT, "diamond", 13, [p for p in known if p.id in best]),
            "others": ("other points", OTHER, "circle", 9, [p for p in fit if p.id not in best]),
            "out": ("a bound is broken, or a trial has failed", OTHER, "x-thin-open", 9,
                [p for p in known if p not in fit]),
        }  # fmt: skip
        if len(objectives) == 2:
            _step(figure, kinds["front"][-1], axes)
        for name, colour, symbol, size, kept in reversed(list(kinds.values())):
            if kept:
                figure.add_scatter(
                    x=[p.mean[axes[0].figure] for p in kept], y=[p.mean[axes[1].figure] for p in kept],
                    error_x=_bars(kept, axes[0], colour), error_y=_bars(kept, axes[1], colour),
                    mode="markers", marker={"color": colour, "symbol": symbol, "size": size}, name=name,
                    customdata=[p.id for p in kept], hovertext=[hover(p, objectives) for p in kept], hoverinfo="text",
                )  # fmt: skip
        _held_out(figure, [p for p in known if p.id in best], axes)
        _compared(figure, known, axes)
        figure.update_xaxes(title=f"{axes[0].figure} ({_wanted(axes[0])})")
        figure.update_yaxes(title=f"{axes[1].figure} ({_wanted(axes[1])})")
        figure.update_layout(height=460)
        caption = "Bars: standard deviation over the trials of a point. A click, or a tap, opens the point."
        yield Chart(f"front-{number}", "Pareto front", caption, figure)


def _wanted(objective: Objective) -> str:
    return "smaller is better" if objective.direction == "minimise" else "larger is better"


def _bars(points: list[Point], objective: Objective, colour: str) -> dict:
    spreads = [point.spread[objective.figure] for point in points]
    return {"type": "data", "array": spreads, "color": colour, "thickness": 1, "width": 0, "visible": any(spreads)}


def _step(figure: "go.Figure", points: list[Point], axes: tuple[Objective, Objective]) -> None:
    """The border of what the front dominates."""
    first, second = axes
    kept = sorted(points, key=lambda point: first.loss(point.mean))
    figure.add_scatter(
        x=[p.mean[first.figure] for p in kept], y=[p.mean[second.figure] for p in kept], mode="lines",
        line={"color": FRONT, "width": 1, "dash": "dot", "shape": "hv"}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip


def _held_out(figure: "go.Figure", points: list[Point], axes: tuple[Objective, Objective]) -> None:
    """The points of the front as they are on the held-out images, joined to what they were on those that were tuned
    on."""
    x, y, told = [], [], []
    for point in points:
        measured = means.held_out(point)
        if all(objective.figure in measured for objective in axes):
            x += [point.mean[axes[0].figure], measured[axes[0].figure], None]
            y += [point.mean[axes[1].figure], measured[axes[1].figure], None]
            told.append(point)
    if not told:
        return
    figure.add_scatter(x=x, y=y, mode="lines", line={"color": LINE, "width": 1}, hoverinfo="skip", showlegend=False)
    figure.add_scatter(
        x=x[1::3], y=y[1::3], mode="markers", name="the front on held-out images",
        marker={"color": LINE, "symbol": "diamond-open", "size": 11, "line": {"width": 2}},
        customdata=[p.id for p in told], hoverinfo="text",
        hovertext=[
            f"<b>{p.id}</b>, held-out images<br>{axes[1].figure} {b:.4g}<br>{axes[0].figure} {a:.4g}"
            for p, a, b in zip(told, x[1::3], y[1::3], strict=True)
        ],
    )  # fmt: skip


def _compared(figure: "go.Figure", points: Sequence[Point], axes: tuple[Objective, Objective]) -> None:
    for (name, figures), symbol in zip(means.compared_with(points).items(), ("star", "cross"), strict=False):
        if all(objective.figure in figures for objective in axes):
            x, y = (figures[objective.figure] for objective in axes)
            figure.add_scatter(
                x=[x], y=[y], mode="markers", name=name,
                marker={"color": INK if name != "oracle" else ORACLE, "symbol": symbol, "size": 13},
                hovertext=[f"<b>{name}</b><br>{axes[1].figure} {y:.4g}<br>{axes[0].figure} {x:.4g}"], hoverinfo="text",
            )  # fmt: skip
