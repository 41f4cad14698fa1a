"""The commands that submit and manage jobs: `unlearn submit`, `unlearn jobs ...`."""

import sys
from contextlib import contextmanager
from typing import Annotated

import typer

from unlearn.cli.options import Config, Set, load
from unlearn.signals import Stopped

app = typer.Typer(
    no_args_is_help=True, help="List, follow, stop, resume and forget jobs that `unlearn submit` has started."
)

To = Annotated[
    str,
    typer.Option(
        "--to", envvar="UNLEARN_TO", metavar="PLACE", help="local, a Ray cluster http://HEAD:8265, or k8s[:CONTEXT]"
    ),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="a job, as `unlearn jobs list` names it")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="k8s: the namespace; default: the context's")]
Json = Annotated[bool, typer.Option("--json", help="for programs")]


def submit(
    config: Config,
    to: To = "local",
    overrides: Set = [],  # noqa: B006  read only
    driver: Annotated[
        str, typer.Option(help="the command that the job runs: run, pretrain, evaluate, sweep or pack")
    ] = "run",
    arguments: Annotated[
        list[str], typer.Option("--arg", help="given to the driver behind its configuration; may be repeated")
    ] = [],  # noqa: B006  read only
    name: Annotated[str | None, typer.Option(help="the readable part of the job's id; default: the run's name")] = None,
    env: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="a variable that must be set where the job runs; values never travel"),
    ] = [],  # noqa: B006  read only
    mounted: Annotated[
        bool, typer.Option("--mounted", help="run_dir is a path that every node of the cluster has")
    ] = False,
    working_dir: Annotated[
        str | None, typer.Option(help="Ray: code to send; `none` where it is installed; default: this checkout")
    ] = None,
    overlay: Annotated[
        str | None, typer.Option(help="k8s: gpu, gpu-spot, cpu-demo, or the YAML file of a RayJob")
    ] = None,
    image: Annotated[str | None, typer.Option(help="k8s: the image with this software")] = None,
    namespace: Namespace = None,
    queue: Annotated[str | None, typer.Option(help="k8s: Kueue's local queue")] = None,
    priority: Annotated[
        str | None, typer.Option(help="k8s: Kueue's priority class; unlearn-request passes unlearn-batch")
    ] = None,
    secret: Annotated[
        list[str], typer.Option(metavar="NAME=SECRET/KEY", help="k8s: a variable from a key of a Secret there")
    ] = [],  # noqa: B006  read only
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be sent, and send nothing")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="follow the job to its end; exit with 1 where it did not succeed")
    ] = False,
    retries: Annotated[int, typer.Option(min=0, help="with --wait: resume it so often after a failure")] = 0,
):
    """Run a configuration elsewhere: as a process of its own here, on a Ray cluster, or on Kubernetes.

    Example: `unlearn submit run.yaml --to http://head:8265 --set run_dir=s3://bucket/runs/7 --wait`
    """
    from jobs import submit as job
    from unlearn.cli.console import err

    if driver == "sweep":
        from unlearn.search.sweep_file import load as load_sweep

        settings = load_sweep(config, overrides)
    elif driver == "pack":
        from unlearn.data.pack_file import load as load_packing

        settings = load_packing(config, overrides)
    else:
        settings = load(config, overrides)
    place = job.backend(
        to, working_dir=working_dir, overlay=overlay, image=image, namespace=namespace, queue=queue, priority=priority,
        secret=tuple(secret),
    )  # fmt: skip
    sent = job.request(settings, driver, arguments, env, name, elsewhere=to != "local")
    if dry_run:
        typer.echo(place.plan(sent), nl=False)
        return
    submitted, new = job.submit(place, sent, mounted)
    typer.echo(submitted.id)
    err.print(
        f"{'submitted' if new else 'is there already'}: {submitted.state}, run folder {submitted.run_dir}",
        soft_wrap=True,
        markup=False,
    )
    if wait:
        _follow(place, submitted.id, retries)
    elif new:
        err.print(f"follow it: unlearn jobs logs {submitted.id} --to {to} --follow", soft_wrap=True, markup=False)


@app.command(name="list")
def list_jobs(to: To = "local", namespace: Namespace = None, as_json: Json = False):
    """List the jobs of a place, the newest first."""
    from unlearn.cli.console import out

    jobs = _place(to, namespace).jobs()
    if as_json:
        return _json([vars(job) for job in jobs])
    rows = [("job", "state", "submitted", "run folder", "")]
    rows += [(job.id, job.state, _time(job.submitted), job.run_dir, job.message) for job in jobs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # however narrow the terminal is: a run folder is there to be copied
        out.print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), soft_wrap=True
        )


@app.command()
def status(id: Id, to: To = "local", namespace: Namespace = None, as_json: Json = False):
    """Tell a job's state, and why it is so."""
    from unlearn.cli.console import out

    job = _place(to, namespace).get(id)
    if as_json:
        return _json(vars(job))
    out.print(f"{job.id}: {job.state}" + (f" ({job.message})" if job.message else ""), soft_wrap=True)
    out.print(f"submitted {_time(job.submitted)}, run folder {job.run_dir}", soft_wrap=True)


@app.command()
def logs(
    id: Id, to: To = "local", namespace: Namespace = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the job is over")] = False,
):  # fmt: skip
    """Print what a job's driver has printed."""
    with _interruptible(f"the job goes on; unlearn jobs stop {id} --to {to} stops it"):
        for piece in _place(to, namespace).logs(id, follow):
            sys.stdout.write(piece)
            sys.stdout.flush()


@app.command()
def stop(id: Id, to: To = "local", namespace: Namespace = None):
    """Stop a job; it can be resumed from its newest checkpoint."""
    from unlearn.cli.console import out

    place = _place(to, namespace)
    place.stop(id)
    out.print(f"{id}: {place.get(id).state}", soft_wrap=True)


@app.command()
def resume(
    id: Id, to: To = "local", namespace: Namespace = None,
    wait: Annotated[bool,
        typer.Option("--wait", help="follow the job to its end; exit with 1 where it did not succeed")] = False,
    retries: Annotated[int, typer.Option(min=0, help="with --wait: resume it so often after a failure")] = 0,
):  # fmt: skip
    """Start a job again that failed or was stopped; it goes on from its newest checkpoint."""
    from jobs import submit as job
    from unlearn.cli.console import out

    place = _place(to, namespace)
    out.print(f"{id}: {job.resume(place, id).state}", soft_wrap=True)
    if wait:
        _follow(place, id, retries)


@app.command()
def rm(id: Id, to: To = "local", namespace: Namespace = None):
    """Forget a job that is over, and its log. Its run folder stays."""
    from jobs import submit as job

    job.remove(_place(to, namespace), id)


def _place(to: str, namespace: str | None):
    from jobs.submit import backend

    return backend(to, namespace=namespace)


def _follow(place, id: str, retries: int) -> None:
    """A progress bar from the run's metrics until the job is over; exits with 1 where it has not succeeded."""
    from jobs import submit as job
    from unlearn.cli.console import err, out, progress, training

    with (
        _interruptible(f"the job goes on; follow it with: unlearn jobs logs {id} --to {place.where} --follow"),
        progress("training") as advance,
    ):
        ended = job.wait(
            place, id, lambda row: advance(*training(row)), retries=retries,
            told=lambda job: err.print(f"{job.id}: {job.state}  {job.message}".rstrip(), soft_wrap=True, markup=False),
        )  # fmt: skip
    if ended.state != "succeeded":
        err.print(
            f"go on from its newest checkpoint: unlearn jobs resume {id} --to {place.where} --wait",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(1)
    out.print(f"run folder: {ended.run_dir}", soft_wrap=True)


@contextmanager
def _interruptible(hint: str):
    """Where the watcher is asked to stop, say that it is not the job."""
    try:
        yield
    except Stopped as e:
        e.hint = hint
        raise


def _time(seconds: float | None) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"


def _json(value) -> None:
    import json

    typer.echo(json.dumps(value, indent=1))
