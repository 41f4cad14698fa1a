"""The commands on configurations: `unlearn config check`, `show`, `schema`."""

import json

import typer

from unlearn.cli.options import Config, Set, load

app = typer.Typer(no_args_is_help=True, help="Check and show configurations.")


@app.command()
def check(config: Config, overrides: Set = []):  # noqa: B006  read only
    """Check a configuration, its data, its sets and its weights, without training."""
    from jobs.train import check as check_all
    from unlearn.cli.console import out
    from unlearn.data.selection import describe

    settings = load(config, overrides)
    for name, about in describe(check_all(settings).sets).items():
        out.print(f"{name}: {about['images']} images of {len(about['classes'])} classes")
    out.print(f"{config}: good, hash {settings.hash()[:12]}", soft_wrap=True)


@app.command()
def show(config: Config, overrides: Set = []):  # noqa: B006  read only
    """Print a configuration with all defaults."""
    from unlearn.config import dump

    typer.echo(dump(load(config, overrides)))


@app.command()
def schema():
    """Print the JSON schema of configurations: every key, its meaning and its default."""
    from unlearn.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
