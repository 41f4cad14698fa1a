"""What every drawing of a sweep's page shares: what a drawing is, colours, plotly, what is told of a point.

Colours are those of the page's light palette; its script puts those of the dark one in their places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unlearn.errors import MissingExtra
from unlearn.search import study
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


def hover(point: Point, objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()) -> str:
    """What is told of a point under the pointer, as plotly's lines."""
    names = study.labels(point.parameters)
    lines = [f"<b>{point.id}</b>"]
    lines += [f"{safe(names[key])} {safe(study.text(value))}" for key, value in point.parameters.items()]
    done = sum(trial.status == "done" for trial in point.trials)
    for figure in dict.fromkeys([*(o.figure for o in objectives), *(c.figure for c in constraints)]):
        if figure in point.mean:
            spread = f" ± {point.spread[figure]:.2g}" if done > 1 else ""
            lines.append(f"{safe(figure)} {point.mean[figure]:.4g}{spread}")
    return "<br>".join([*lines, f"{done} of {len(point.trials)} trials done"])


def safe(text: str) -> str:
    """A text for plotly, which reads tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
