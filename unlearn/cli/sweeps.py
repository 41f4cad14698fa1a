"""The commands that search: `unlearn sweep SWEEP.yaml`, and `list`, `show`, `best`, `promote`, `report` of it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from unlearn.cli.options import ShowForget

if TYPE_CHECKING:
    from unlearn.search.objectives import Constraint
    from unlearn.search.records import Point, Trial
    from unlearn.search.space import Sweep


class StartsByDefault(TyperGroup):
    """A group whose first word may be a file: `unlearn sweep SWEEP.yaml` is `unlearn sweep start SWEEP.yaml`."""

    default = "start"

    def resolve_command(self, ctx, args):
        return super().resolve_command(ctx, args if args[0] in self.commands else [self.default, *args])


app = typer.Typer(
    cls=StartsByDefault, no_args_is_help=True, subcommand_metavar="SWEEP.yaml | COMMAND [ARGS]...",
    help="Search for the trade-off between forgetting and keeping: "
    "`unlearn sweep SWEEP.yaml` starts a sweep, or goes on with it.",
)  # fmt: skip

Dir = Annotated[
    str | None,
    typer.Option(
        "--dir", envvar="UNLEARN_SWEEP", help="the sweep's folder, or its YAML; default: the only sweep below runs/"
    ),
]
PointId = Annotated[str, typer.Argument(metavar="POINT", help="a point, as `unlearn sweep show` names it")]


@app.command()
def start(
    source: Annotated[
        str, typer.Argument(metavar="SWEEP.yaml", help="a YAML file, or the folder of a sweep (path or s3://)")
    ],
    overrides: Annotated[
        list[str],
        typer.Option("--set", "-s", metavar="KEY=VALUE",
            help="override one, as in concurrent=2, run.training.steps=100"),
    ] = [],  # noqa: B006  read only
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run trials again that have failed")] = False,
):  # fmt: skip
    """Start a sweep, or go on with it: `unlearn sweep SWEEP.yaml` is the same.

    Example: `unlearn sweep jobs/configs/sweep_alpha_fashion.yaml --set budget.points=8`
    """
    from jobs import sweep as job
    from jobs.owner import owned
    from unlearn import signals
    from unlearn.cli.console import err, out
    from unlearn.cli.options import required
    from unlearn.cli.sweep_table import live, status
    from unlearn.search.sweep_file import load

    required()
    sweep = load(source, overrides)
    with owned(sweep.sweep_dir, "sweep") as lease:
        try:
            job.prepare(sweep)
            with live(sweep) as shown:
                trials = job.sweep(
                    sweep, lambda now: shown(now.trials, now.rows, now.seconds_left), lease.check, retry_failed
                )
        except signals.Stopped as e:
            id = os.environ.get(signals.JOB)
            again = f"unlearn jobs resume {id}" if id else f"unlearn sweep {sweep.sweep_dir}"
            e.hint = f"what has ended stays, what runs goes on from its checkpoints: {again}"
            raise
    if not err.is_terminal:
        out.print(status(sweep, trials, shown=None))
    out.print(f"sweep: {sweep.sweep_dir}; its page: unlearn sweep report --dir {sweep.sweep_dir}", soft_wrap=True)


@app.command(name="list")
def list_sweeps(
    folder: Annotated[str, typer.Argument(help="where to look: a path or s3://bucket/prefix")] = "runs",
):
    """List the sweeps below a folder."""
    from unlearn.cli.console import out
    from unlearn.cli.sweep_table import told
    from unlearn.search import front

    rows = [("sweep", "points", "front", "trials")]
    for found in _below(folder):
        sweep, trials = _opened(found)
        every = _points(sweep, trials)
        rows.append((found, str(len(every)), str(len(front.of_points(every, sweep.wanted))), told(trials, len(trials))))
    if len(rows) == 1:
        out.print(f"no sweep below {folder}", soft_wrap=True)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # however narrow the terminal is: a folder is there to be copied
        cells = zip(row, widths, strict=True)
        out.print("  ".join(cell.ljust(width) for cell, width in cells).rstrip(), soft_wrap=True)


@app.command()
def show(
    point: Annotated[
        str | None, typer.Argument(metavar="[POINT]", help="one point alone, with its trials and configuration")
    ] = None,
    folder: Dir = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
):
    """Show the points of a sweep, those of the front first; or all about one of them.

    Example: `unlearn sweep show p003 --dir runs/alpha`
    """
    from unlearn.cli.console import out
    from unlearn.cli.sweep_table import show_point, status

    sweep, trials = _opened(folder)
    if as_json:
        from unlearn.search.page import document

        whole = document(sweep, trials)
        if point is not None:
            _find(_points(sweep, trials), point)
            whole = next(one for one in whole["points"] if one["id"] == point)
        typer.echo(json.dumps(whole, indent=1))
    elif point is None:
        out.print(status(sweep, trials, shown=None))
    else:
        show_point(sweep, _find(_points(sweep, trials), point))


@app.command()
def best(
    where: Annotated[
        list[str],
        typer.Option(metavar="BOUND", help='a further bound, as in "retain.cosine.drop <= 0.01"; may be repeated'),
    ] = [],  # noqa: B006  read only
    by: Annotated[
        str | None, typer.Option(metavar="FIGURE", help="the objective that decides; default: the first")
    ] = None,
    folder: Dir = None,
):
    """Print the configuration of the best point, for `unlearn run`.

    Example: `unlearn sweep best --where "retain.cosine.drop <= 0.01" --by forget.cosine.to_oracle > best.yaml`
    """
    from unlearn.cli.console import err
    from unlearn.cli.sweep_table import value
    from unlearn.errors import UnlearnError
    from unlearn.search import alone

    sweep, trials = _opened(folder)
    objective = _objective(sweep, by)
    bounds = _bounds(sweep, where)
    fit = [p for p in _points(sweep, trials) if p.complete and p.feasible and objective.figure in p.mean]
    if not fit:
        raise UnlearnError(f"{sweep.sweep_dir}: no point is complete and keeps the sweep's own bounds")
    kept = [p for p in fit if all(bound.holds(p.mean) for bound in bounds)]
    if not kept:
        near = min(fit, key=lambda p: max(bound.violation(p.mean) for bound in bounds))
        told = ", ".join(f"{b.figure} {near.mean[b.figure]:.4g}" for b in bounds if b.figure in near.mean)
        raise UnlearnError(f"no point keeps {' and '.join(map(str, bounds))}; the nearest is {near.id} with {told}")
    chosen = min(kept, key=lambda p: objective.loss(p.mean))
    figures = dict.fromkeys([o.figure for o in sweep.wanted] + [b.figure for b in (*sweep.bounds, *bounds)])
    told = ", ".join(f"{figure} {value(chosen, figure)}" for figure in figures)
    typer.echo(f"# {chosen.id} of {sweep.sweep_dir}: {told}")
    typer.echo(alone.text(sweep, chosen, chosen.trials[0].seed, chosen.trials[0].model), nl=False)
    err.print(
        f"as a run folder: unlearn sweep promote {chosen.id} RUN_DIR --dir {sweep.sweep_dir}",
        soft_wrap=True,
        markup=False,
    )


@app.command()
def promote(
    point: PointId, run_dir: Annotated[str, typer.Argument(help="a new folder, or s3://bucket/prefix")],
    folder: Dir = None,
    seed: Annotated[int | None, typer.Option(help="of which trial; default: the first that is done")] = None,
    show_forget: ShowForget = False,
):  # fmt: skip
    """Make a run folder of a point, as if it had been run alone: model, checkpoints, figures on held-out images,
    report.

    Example: `unlearn sweep promote p003 runs/chosen --dir runs/alpha`
    """
    from jobs import promote as job
    from jobs.owner import owned
    from unlearn.cli.console import out, progress
    from unlearn.config import location
    from unlearn.data.storage import Storage
    from unlearn.errors import UnlearnError
    from unlearn.evaluation.report import NAME, table

    sweep, trials = _opened(folder)
    done = [t for t in _find(_points(sweep, trials), point).trials if t.status == "done" and seed in (None, t.seed)]
    if not done:
        raise UnlearnError(f"{point} has no trial that is done{'' if seed is None else f' with seed {seed}'}")
    run_dir = location(run_dir)
    with owned(run_dir, "sweep promote") as lease, progress("evaluating") as advance:
        run, metrics = job.promote(
            sweep, done[0], run_dir, lambda d, total: advance(d, total, ""), show_forget, lease.check
        )
    out.print(table(metrics))
    out.print(f"run folder: {run.folder}\nreport: {Storage(run.folder).where(NAME)}", soft_wrap=True)


@app.command()
def report(
    folder: Dir = None, show_forget: ShowForget = False,
    again: Annotated[bool, typer.Option("--again", help="measure also what was measured there before")] = False,
    whole: Annotated[bool, typer.Option("--all", help="measure all points, so that ablations are on held-out images")]
    = False,
):  # fmt: skip
    """Measure the points of the front once more, on held-out images, and write the sweep's page.

    Example: `unlearn sweep report --dir runs/alpha`
    """
    from jobs import sweep_report as job
    from jobs.owner import owned
    from unlearn.cli.console import out, progress
    from unlearn.cli.sweep_table import both

    sweep, _ = _opened(folder)
    what = f"measuring {'all points' if whole else 'the front'}"
    with owned(sweep.sweep_dir, "sweep report") as lease, progress(what) as advance:
        uri = job.report(sweep, show_forget, lambda done, total: advance(done, total, ""), lease.check, again, whole)
    _, trials = _opened(sweep.sweep_dir)
    if any(trial.held_out for trial in trials):
        out.print(both(sweep, trials))
    out.print(f"report: {uri}", soft_wrap=True)


def _opened(folder: str | None) -> tuple["Sweep", list["Trial"]]:
    """A sweep and its records. Raises ConfigError where none is named, or none is there."""
    from unlearn.config import location
    from unlearn.data.storage import Storage
    from unlearn.errors import ConfigError
    from unlearn.search import sweep_file
    from unlearn.search.records import Trials

    if folder is None:
        there = _below("runs")
        if len(there) != 1:
            raise ConfigError(f"name the sweep with --dir FOLDER: there are {', '.join(there) or 'none'} below runs/")
        folder = there[0]
    # The folder that was named is meant, also where it is a copy of the one that its file names.
    here = [] if Path(folder).suffix in (".yaml", ".yml") else [f"sweep_dir={json.dumps(location(folder))}"]
    sweep = sweep_file.load(folder, here)
    return sweep, Trials(Storage(sweep.sweep_dir)).all()


def _below(folder: str) -> list[str]:
    """The sweeps' folders below this one, up to two levels down."""
    from unlearn.data.storage import Storage
    from unlearn.search.records import SWEEP

    if "://" in folder:
        storage = Storage(folder)
        return [storage.where(name).rpartition("/")[0] for name in storage.files() if name.rpartition("/")[2] == SWEEP]
    found = [*Path(folder).glob(SWEEP), *Path(folder).glob(f"*/{SWEEP}"), *Path(folder).glob(f"*/*/{SWEEP}")]
    return sorted(str(path.parent) for path in found)


def _points(sweep: "Sweep", trials: Sequence["Trial"]) -> list["Point"]:
    from unlearn.search.records import points

    return points(trials, sweep.bounds)


def _find(every: list["Point"], id: str) -> "Point":
    from unlearn.errors import UnlearnError

    known = next((point for point in every if point.id == id), None)
    if known is None:
        raise UnlearnError(f"no point {id!r}; there are {', '.join(point.id for point in every[:20]) or 'none yet'}")
    return known


def _objective(sweep: "Sweep", by: str | None):
    from unlearn.errors import ConfigError

    for objective in sweep.wanted:
        if by in (None, objective.figure):
            return objective
    raise ConfigError(f"--by {by}: no objective of this sweep; its objectives are {', '.join(sweep.objectives)}")


def _bounds(sweep: "Sweep", where: Sequence[str]) -> list["Constraint"]:
    from unlearn.errors import ConfigError
    from unlearn.search.objectives import Constraint, check_name

    try:
        bounds = [Constraint.parse(text) for text in where]
    except ConfigError as e:
        raise ConfigError(f"--where: {e}") from None
    for bound in bounds:
        check_name(bound.figure, sweep.settings, "--where")
    return bounds
