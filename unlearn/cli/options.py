"""Arguments and options that several commands share, and how a configuration is loaded for them."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from unlearn.errors import ConfigError

if TYPE_CHECKING:
    from unlearn.config import RunConfig

Config = Annotated[str, typer.Argument(help="a YAML file, or the folder of a run (path or s3://)")]
Set = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="override one value, as in method.alpha=0.5")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in run_dir")]
ShowForget = Annotated[bool, typer.Option("--show-forget", help="put pictures of the forget set into the report")]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="of one worker's device, as in 80GiB; default: what is found"),
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="KIND", help="as in H100, H200, A100, L40S or B200, where none is at hand"),
]
Mfu = Annotated[float | None, typer.Option("--mfu", min=0.01, max=1, help="share of the device's peak that is reached")]


def load(source: str, overrides: list[str]) -> "RunConfig":
    """The configuration that a command names, with a warning for everything in it that will be ignored. Raises
    UnlearnError."""
    from unlearn import run

    required()
    return warned(run.load(source, overrides))


def required() -> None:
    """Raise ConfigError where a variable is missing that a submitted job was promised."""
    missing = [
        name for name in os.environ.get("UNLEARN_REQUIRED_ENV", "").split(",") if name and name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not set where the job runs, and it was submitted with --env {missing[0]}; set it "
            "there"
        )


def warned(settings: "RunConfig") -> "RunConfig":
    """`settings`, after a warning for everything in it that will be ignored; its patience with the storage holds from
    now on."""
    from unlearn import patience
    from unlearn.cli.console import warn
    from unlearn.config_checks import ignored

    patience.use(settings.storage.patience)
    for text in ignored(settings):
        warn(text)
    return settings
