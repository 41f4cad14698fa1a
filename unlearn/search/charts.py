"""The drawings of a sweep's page, as figures of plotly; those of Optuna where it has one.

Colours are those of the page's light palette; its script puts those of the dark one in their places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from unlearn.errors import MissingExtra
from unlearn.search import ablation, front, means, study
from unlearn.search.objectives import Constraint, Objective
from unlearn.search.records import Point

if TYPE_CHECKING:
    import plotly.graph_objects as go

FRONT, OTHER, ORACLE, LINE, INK = "#b4470f", "#5b6472", "#17706b", "#2b5fb0", "#1c1d21"
COLOURS = (LINE, FRONT, ORACLE, "#8a4fb3", "#8a6d00", OTHER, "#a8325e", "#3d7a2a")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "hexagon")


@dataclass(frozen=True)
class Chart:
    """A figure with what is said above and below it. id: of its place in the page; wide: whether it takes the whole
    width; narrowest: pixels below which it is scrolled."""

    id: str
    title: str
    caption: str
    figure: "go.Figure"
    wide: bool = True
    narrowest: int = 0


def module() -> Any:
    """plotly's graph objects. Raises MissingExtra."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingExtra("plotly", "sweep", "the page of a sweep") from None
    return go


def script() -> str:
    """plotly.js, whole. Raises MissingExtra."""
    module()
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


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
        "fronts": list(_fronts(points, objectives)),
        "searched": [chart for chart in searched if chart],
        "ablations": list(_ablations(points, objectives)),
    }


def hover(point: Point, objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()) -> str:
    """What is told of a point under the pointer, as plotly's lines."""
    names = study.labels(point.parameters)
    lines = [f"<b>{point.id}</b>"]
    lines += [f"{_safe(names[key])} {_safe(study.text(value))}" for key, value in point.parameters.items()]
    done = sum(trial.status == "done" for trial in point.trials)
    for figure in dict.fromkeys([*(o.figure for o in objectives), *(c.figure for c in constraints)]):
        if figure in point.mean:
            spread = f" ± {point.spread[figure]:.2g}" if done > 1 else ""
            lines.append(f"{_safe(figure)} {point.mean[figure]:.4g}{spread}")
    return "<br>".join([*lines, f"{done} of {len(point.trials)} trials done"])


def _safe(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _fronts(points: Sequence[Point], objectives: Sequence[Objective]) -> Iterator[Chart]:
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
            hovertemplate="%{y}: %{x:.0%}<extra>" + _safe(target) + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        height=max(260, 120 + 30 * len(order) * len(shares)), xaxis={"tickformat": ".0%", "range": [0, 1]}
    )
    caption = (
        f"PED-ANOVA: how much the parameters of the best {study.BEST:.0%} of the points differ from those of all. It "
        "ranks parameters; with few points it is rough."
    )
    return Chart("importance", "Importance of parameters", caption, figure, wide=False)


def _ablations(points: Sequence[Point], objectives: Sequence[Objective]) -> Iterator[Chart]:
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
            for curve, colour, symbol in zip(
                drawn, COLOURS, SYMBOLS, strict=True if len(drawn) == len(COLOURS) else False
            ):
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
            f"<b>{at.point}</b>, {_safe(name)}<br>{_safe(str(x))}: {at.mean:.4g}" for x, at in zip(xs, curve.at,
                strict=True)
        ],
        hoverinfo="text",
    )  # fmt: skip
