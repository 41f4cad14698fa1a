"""The commands on the cycle as a Kubeflow pipeline: `unlearn pipeline compile`, `run`, `schedule`, `watch` ..."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from unlearn.cli.cycles import DUE
from unlearn.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.kubeflow import Kubeflow
    from pipelines.place import Place

app = typer.Typer(
    no_args_is_help=True,
    help="Serve deletion requests by a Kubeflow pipeline, once or by a schedule, or by its local runner.",
)

Source = Annotated[str, typer.Argument(metavar="CYCLE.yaml", help="a cycle's file (path or s3://)")]
To = Annotated[
    str | None,
    typer.Option(
        "--to", metavar="PLACE", help="where to train: k8s (a RayJob), http://HEAD:8265, or here, in the step"
    ),
]
Image = Annotated[
    str | None, typer.Option("--image", help="of the steps and of the RayJob: this software, of this release")
]
Gpus = Annotated[int, typer.Option("--gpus", min=0, help="of a step that computes; training elsewhere has its own")]
Cpus = Annotated[int, typer.Option("--cpus", min=1, help="the same")]
Memory = Annotated[str, typer.Option("--memory", metavar="SIZE", help="the same, as Kubernetes writes it")]
Secrets = Annotated[
    list[str],
    typer.Option("--secret", metavar="NAME=SECRET/KEY", help="a variable of the steps from a key of a Secret there"),
]
Key = Annotated[str | None, typer.Option("--key", metavar="SECRET/KEY", help="the private key that signs releases")]
Parameter = Annotated[
    list[str],
    typer.Option(
        "--parameter", "-p", metavar="NAME=VALUE", help="of the pipeline: overlay, namespace, priority (of a RayJob)"
    ),
]
Mounted = Annotated[bool, typer.Option("--mounted", help="paths are of a volume that every pod has")]
Host = Annotated[str, typer.Option("--host", envvar="UNLEARN_KFP_HOST", metavar="URL", help="of Kubeflow Pipelines")]
Profile = Annotated[str, typer.Option("--profile", help="the user's namespace, where Kubeflow has several users")]
TokenFile = Annotated[
    str,
    typer.Option(
        "--token-file", metavar="FILE", help="default: UNLEARN_KFP_TOKEN_FILE; or the token in UNLEARN_KFP_TOKEN"
    ),
]
Authority = Annotated[
    str, typer.Option("--ca", metavar="FILE", help="certificates to trust, PEM; default: the system's")
]
Account = Annotated[
    str, typer.Option("--account", help="service account of the steps' pods; default: the server's choice")
]


@app.command()
def compile(
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="where to write it, .yaml")],
    source: Annotated[str | None, typer.Argument(metavar="[CYCLE.yaml]", help="a cycle's file (path or s3://)")] = None,
    rungs: Annotated[int, typer.Option(min=1, help="without a cycle: 1, and one for each entry of its ladder")] = 1,
    objects: Annotated[bool, typer.Option("--objects", help="as Kubernetes objects, for kubectl apply")] = False,
    namespace: Annotated[str, typer.Option(help="with --objects: Kubeflow's")] = "kubeflow",
    to: To = None,
    image: Image = None, gpus: Gpus = 0, cpus: Cpus = 4, memory: Memory = "16Gi",
    secrets: Secrets = [], key: Key = None,  # noqa: B006  read only
):  # fmt: skip
    """Write the pipeline as a file that Kubeflow takes.

    Example: `unlearn pipeline compile cycle.yaml --output cycle-pipeline.yaml --image registry.example.com/unlearn:1`
    """
    from unlearn.cli.console import say

    place = _place(image, gpus, cpus, memory, secrets, key)
    from pipelines import compiling
    from pipelines.cycle import TO, pipeline
    from pipelines.place import training

    # Where a file of this machine will lie for a cluster is known when it is sent.
    there = {"cycle": source} if source and "://" in source else {}
    cycle = _load(source) if source else None
    audited = cycle is not None and cycle.audit is not None
    made = pipeline(cycle.rungs if cycle else rungs, place, audited=audited, to=training(to or TO), **there)
    compiling.compile(made, output, objects, namespace)
    say(f"written: {output}")


@app.command()
def run(
    source: Source,
    local: Annotated[bool, typer.Option("--local", help="here, by kfp's local runner, a process a step")] = False,
    artifacts: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="with --local: keep what the steps show")
    ] = None,
    to: To = None, parameter: Parameter = [],  # noqa: B006  read only
    image: Image = None, gpus: Gpus = 0, cpus: Cpus = 4, memory: Memory = "16Gi",
    secrets: Secrets = [], key: Key = None,  # noqa: B006  read only
    host: Host = "", profile: Profile = "", token_file: TokenFile = "", authority: Authority = "",
    account: Account = "",
    mounted: Mounted = False, name: Annotated[str, typer.Option(help="of the run")] = "unlearn-cycle",
    wait: Annotated[bool, typer.Option("--wait", help="watch it to its end")] = False,
):  # fmt: skip
    """Run the pipeline once: here, or in Kubeflow.

    Example: `unlearn pipeline run cycle.yaml --local`
    """
    from unlearn.cli.console import out

    if not local and not host:
        raise ConfigError("say where: --local, or --host URL")
    if local:
        return _run_here(source, to, parameter, image, artifacts)
    place = _place(image, gpus, cpus, memory, secrets, key)
    with _sent(source, place, to, parameter, mounted) as (package, parameters):
        server = _server(host, profile, token_file, authority)
        id = server.run(package, parameters, name, account)
    out.print(id)
    if wait:
        _watch(server, id)


@app.command()
def schedule(
    source: Source,
    expression: Annotated[
        str,
        typer.Option("--cron", metavar="FIELDS", help="six: second minute hour day-of-month month day-of-week"),
    ],
    host: Host, profile: Profile = "", token_file: TokenFile = "", authority: Authority = "", account: Account = "",
    name: Annotated[str, typer.Option(help="of the schedule; what has this name is replaced")] = "unlearn-cycle",
    timezone: Annotated[
        str, typer.Option(help="of Kubeflow's controller (its CRON_SCHEDULE_TIMEZONE); a schedule has none of its own")
    ] = "UTC",
    to: To = None, parameter: Parameter = [],  # noqa: B006  read only
    image: Image = None, gpus: Gpus = 0, cpus: Cpus = 4, memory: Memory = "16Gi",
    secrets: Secrets = [], key: Key = None,  # noqa: B006  read only
    mounted: Mounted = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, show the next times, and send nothing")] = False,
):  # fmt: skip
    """Run the pipeline by a schedule: one run at a time, none caught up on. The same again changes nothing.

    Example: `unlearn pipeline schedule cycle.yaml --cron "0 0 3 * * *" --host https://kubeflow.example.com/pipeline`
    """
    from unlearn.cli.console import out, say

    place = _place(image, gpus, cpus, memory, secrets, key)
    from pipelines import cron
    from pipelines import schedule as schedules

    times = cron.upcoming(expression, cron.zone(timezone))
    if not dry_run:
        with _sent(source, place, to, parameter, mounted) as (package, parameters):
            server = _server(host, profile, token_file, authority)
            id, new = schedules.replace(server, name, expression, package, parameters, account)
        out.print(f"{name}: {'scheduled' if new else 'is scheduled already'}, {id}", soft_wrap=True)
    for time in times:
        out.print(f"next: {time:%Y-%m-%d %H:%M:%S} {timezone}", soft_wrap=True)
    say(
        f"in {timezone}: Kubeflow's controller counts in UTC, unless its CRON_SCHEDULE_TIMEZONE says otherwise; "
        "tell its time zone with --timezone"
    )


@app.command(name="schedules")
def list_schedules(host: Host, profile: Profile = "", token_file: TokenFile = "", authority: Authority = ""):
    """List the schedules of our experiment.

    Example: `unlearn pipeline schedules --host https://kubeflow.example.com/pipeline`
    """
    from unlearn.cli.console import out

    server = _server(host, profile, token_file, authority)
    from pipelines import schedule as schedules

    rows = [("name", "cron", "", "made", "id")]
    rows += [
        (s.name, s.cron, "enabled" if s.enabled else "disabled", s.created[:16], s.id)
        for s in schedules.schedules(server)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        out.print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), soft_wrap=True
        )


@app.command()
def unschedule(
    host: Host, name: Annotated[str, typer.Argument(help="of the schedule")] = "unlearn-cycle",
    profile: Profile = "", token_file: TokenFile = "", authority: Authority = "",
):  # fmt: skip
    """Delete a schedule. Runs that have begun go on.

    Example: `unlearn pipeline unschedule unlearn-cycle --host https://kubeflow.example.com/pipeline`
    """
    from unlearn.cli.console import out

    server = _server(host, profile, token_file, authority)
    from pipelines import schedule as schedules

    count = schedules.remove(server, name)
    out.print(f"{name}: {'deleted' if count else 'there is no such schedule'}", soft_wrap=True)


@app.command()
def watch(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="id of a run")],
    host: Host, profile: Profile = "", token_file: TokenFile = "", authority: Authority = "",
):  # fmt: skip
    """Tell what becomes of a run, step by step; exits with 1 where it has not succeeded.

    Example: `unlearn pipeline watch 7b1c0a52-0000-4000-8000-000000000000 --host https://kubeflow.example.com/pipeline`
    """
    _watch(_server(host, profile, token_file, authority), run_id)


def _place(image: str | None, gpus: int, cpus: int, memory: str, secrets: list[str], key: str | None) -> "Place":
    from pipelines import kubeflow
    from pipelines import place as places

    kubeflow.required()
    signs = places.key(key) if key else None
    chosen = tuple(map(places.secret, secrets))
    return places.Place(image or places.IMAGE, gpus, cpus, places.memory(memory), chosen, signs)


def _server(host: str, profile: str, token_file: str, authority: str) -> "Kubeflow":
    from pipelines.kubeflow import Kubeflow, required

    required()
    return Kubeflow(host, profile, token_file, authority)


def _load(source: str):
    from unlearn.cycles import cycle_file

    return cycle_file.load(source)


def _run_here(
    source: str, to: str | None, given: list[str], image: str | None, artifacts: str | None
) -> None:  # fmt: skip
    from pathlib import Path

    from pipelines import kubeflow, sending
    from pipelines import local as runner
    from pipelines.place import IMAGE, training
    from pipelines.steps import HERE
    from unlearn.cli.console import out

    kubeflow.required()
    where = source if "://" in source else str(Path(source).absolute())
    now = runner.run(_load(source), where, training(to or HERE), sending.parameters(given), image or IMAGE, artifacts)
    for what, value in now.told().items():
        out.print(f"{what}: {value}", soft_wrap=True)
    if now.outcome is not None and now.outcome.due:
        raise typer.Exit(DUE)


@contextmanager
def _sent(
    source: str, place: "Place", to: str | None, given: list[str], mounted: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    """(path of the compiled pipeline, its parameters), after a check that a cluster can serve this cycle."""
    from pipelines import compiling, sending
    from pipelines.cycle import TO, pipeline
    from pipelines.place import training

    to, parameters, cycle = training(to or TO), sending.parameters(given), _load(source)
    sending.check(cycle, place, mounted)
    made = pipeline(cycle.rungs, place, to=to, audited=cycle.audit is not None)
    with compiling.package(made) as path:
        yield path, parameters | {"cycle": sending.source(cycle, source), "to": to}


def _watch(server: "Kubeflow", run_id: str) -> None:
    from unlearn.cli.console import out
    from unlearn.signals import Stopped

    try:
        state = server.watch(run_id, lambda line: out.print(line, soft_wrap=True))
    except Stopped as e:
        e.hint = f"the run goes on; unlearn pipeline watch {run_id} --host {server.host} follows it again"
        raise
    if state != "SUCCEEDED":
        raise typer.Exit(1)
