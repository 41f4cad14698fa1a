"""`unlearn`: its commands put together, and how it ends."""

import sys
from typing import Annotated

import typer

from unlearn import __version__
from unlearn.cli import (
    audits,
    catalogue,
    comparisons,
    configs,
    cycles,
    jobs,
    pipelines,
    plan,
    releases,
    requests,
    runs,
    shards,
    sweeps,
)
from unlearn.errors import UnlearnError

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Make an image-to-image generator forget chosen images, and prove it. Try `unlearn demo`.",
)  # fmt: skip
for command in (
    runs.run, runs.pretrain, runs.evaluate, runs.report, runs.demo, jobs.submit, plan.plan, catalogue.convert,
    catalogue.models,
    catalogue.methods, comparisons.oracle, comparisons.compare, shards.pack,
):  # fmt: skip
    app.command()(command)
app.add_typer(shards.app, name="shards")
app.add_typer(configs.app, name="config")
app.add_typer(jobs.app, name="jobs")
app.add_typer(sweeps.app, name="sweep")
app.add_typer(cycles.app, name="cycle")
app.add_typer(audits.app, name="audit")
app.add_typer(requests.app, name="request")
app.add_typer(releases.app, name="release")
app.add_typer(pipelines.app, name="pipeline")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 0, and with 2 on a user's mistake."""
    try:
        app(argv)
    except UnlearnError as e:
        from unlearn.cli.console import error

        error(str(e))
        sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit", is_eager=True)] = False,
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, help="tell the stations of a run; twice: more (see UNLEARN_LOG)"),
    ] = 0,
):
    from unlearn.cli.console import show_log

    show_log(verbose)
    if version:
        typer.echo(f"unlearn {__version__}")
        raise typer.Exit
