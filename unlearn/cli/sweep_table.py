"""What the terminal shows of a sweep: how far it is, its best points, and one point with all its figures."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unlearn import log
from unlearn.cli.console import err, out, say
from unlearn.search import alone, front, means
from unlearn.search.objectives import Objective
from unlearn.search.records import Point, Trial, points
from unlearn.search.space import Sweep
from unlearn.search.study import labels, text

SHOWN = 8  # points in the table of a sweep that runs

# Called with the records, the newest row of each trial that trains, and the seconds that are left, where there is
# telling.
Shown = Callable[[Sequence[Trial], Mapping[str, dict], float | None], None]


@contextlib.contextmanager
def live(sweep: Sweep, every: float = 60) -> Iterator[Shown]:
    """Shows a sweep while it runs: call what this gives again and again.

    A table on a terminal; elsewhere a line whenever a trial has ended, and every `every` seconds.
    """
    if log.is_json() or not err.is_terminal:
        last: list[float] = [0, time.monotonic()]

        def line(trials: Sequence[Trial], rows: Mapping[str, dict], left: float | None) -> None:
            over, now = sum(trial.over for trial in trials), time.monotonic()
            if over != last[0] or now - last[1] >= every:
                last[:] = [over, now]
                say(headline(sweep, trials, left))

        yield line
        return
    from rich.live import Live

    with Live(console=err, refresh_per_second=2) as shown:
        yield lambda trials, rows, left: shown.update(status(sweep, trials, rows, left))


def headline(sweep: Sweep, trials: Sequence[Trial], left: float | None = None) -> str:
    """How far a sweep is, on one line: trials by status, the front, time left."""
    every = points(trials, sweep.bounds)
    best = front.of_points(every, sweep.wanted)
    parts = [told(trials, _planned(sweep) or len(trials)), f"front {len(best)} of {len(every)} points"]
    parts += [f"{_time(left)} left"] if left is not None else []
    return f"{sweep.name}: {', '.join(parts)}"


def status(
    sweep: Sweep, trials: Sequence[Trial], rows: Mapping[str, dict] | None = None, left: float | None = None,
    shown: int | None = SHOWN,
) -> Group:  # fmt: skip
    """The headline, a table of the points (the front, then the next in the first objective, `shown` of them at most),
    and the trials that train."""
    every, first = points(trials, sweep.bounds), sweep.wanted[0]
    ahead = front.of_points(every, sweep.wanted)
    known, unknown = [p for p in every if first.figure in p.mean], [p for p in every if first.figure not in p.mean]
    others = [p for p in sorted(known, key=lambda p: first.loss(p.mean)) if p not in ahead]
    names = labels(key for point in every for key in point.parameters)
    table = Table(box=None)
    for head in ("", "point", *names.values()):
        table.add_column(head)
    for objective in sweep.wanted:
        table.add_column(_head(objective), justify="right")
    table.add_column("trials", overflow="fold")
    for point in [*ahead, *others, *unknown][:shown]:
        mark = "◆" if point in ahead else "✗" if point.complete and not point.feasible else ""
        values = [text(point.parameters[key], 24) if key in point.parameters else "" for key in names]
        figures = [value(point, objective.figure) for objective in sweep.wanted]
        ended = told(point.trials, len(point.trials), "/", "")
        table.add_row(mark, point.id, *values, *figures, ended, style="bold" if point in ahead else None)
    training = ", ".join(f"{id} {row['step']}/{row['steps']}" for id, row in (rows or {}).items() if "step" in row)
    return Group(Text(headline(sweep, trials, left)), table, *([Text(f"in training: {training}")] if training else []))


def both(sweep: Sweep, trials: Sequence[Trial]) -> Table:
    """The front as it was tuned, and as it is on held-out images."""
    table = Table("point", box=None)
    for objective in sweep.wanted:
        table.add_column(f"{_head(objective)}\ntuned on", justify="right")
        table.add_column("\nheld out", justify="right")
    for point in front.of_points(points(trials, sweep.bounds), sweep.wanted):
        held_out = means.held_out(point)
        cells = [(value(point, o.figure), _number(held_out.get(o.figure))) for o in sweep.wanted]
        table.add_row(point.id, *(cell for pair in cells for cell in pair))
    return table


def show_point(sweep: Sweep, point: Point) -> None:
    """All about one point: its figures beside those of the original and the oracle, its trials, its configuration."""
    why = f", {point.message}" if point.message else ""
    out.print(f"{point.id}: {told(point.trials, len(point.trials))}{why}", soft_wrap=True)
    columns = {"held out": means.held_out(point), **means.compared_with([point])}
    table = Table("figure", "tuned on", *columns, box=None)
    for figure in point.mean:
        table.add_row(figure, value(point, figure), *(_number(column.get(figure)) for column in columns.values()))
    out.print(table)
    for trial in point.trials:
        out.print(f"{trial.id}: {trial.status}  {trial.run}  {trial.message or ''}".rstrip(), soft_wrap=True)
    out.print(f"\n{alone.text(sweep, point, point.trials[0].seed, point.trials[0].model)}", soft_wrap=True)


def value(point: Point, figure: str) -> str:
    """Mean and, over several trials, spread of a figure."""
    if figure not in point.mean:
        return "–"
    several = sum(trial.status == "done" for trial in point.trials) > 1
    return f"{point.mean[figure]:.4g}" + (f" ± {point.spread[figure]:.2g}" if several else "")


def told(trials: Sequence[Trial], total: int, of: str = " of ", done: str = " done") -> str:
    """How many of `total` trials are done, and what became of the others."""
    counts = Counter("waiting" if t.status == "running" and not t.started else t.status for t in trials)
    others = [f"{count} {status}" for status, count in sorted(counts.items()) if status != "done"]
    return ", ".join([f"{counts['done']}{of}{total}{done}", *others])


def _head(objective: Objective) -> str:
    """The name of an objective, on two lines, with where it is to go."""
    start, _, end = objective.figure.rpartition(".")
    return f"{start}\n.{end} {'↓' if objective.direction == 'minimise' else '↑'}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _planned(sweep: Sweep) -> int | None:
    """Trials in all, where the sweep says so."""
    counts = [count for count in (sweep.budget.points, sweep.size) if count is not None]
    return min(counts) * len(sweep.pairs()) if counts else None


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
