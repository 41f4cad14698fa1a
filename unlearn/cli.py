"""The command line. Each command imports what it needs when it is called, so that `unlearn --help` is quick."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from unlearn import __version__
from unlearn.cli_jobs import jobs_app, submit
from unlearn.cli_plan import Gpu, Memory, Mfu, plan
from unlearn.errors import ConfigError, UnlearnError

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Make an image-to-image generator forget chosen images, and prove it. Try `unlearn demo`.",
)  # fmt: skip
shards_app = typer.Typer(no_args_is_help=True, help="Pack, index, check and describe Parquet shards of images.")
config_app = typer.Typer(no_args_is_help=True, help="Check and show configurations.")
app.add_typer(shards_app, name="shards")
app.add_typer(config_app, name="config")
app.add_typer(jobs_app, name="jobs")

Config = Annotated[str, typer.Argument(help="a YAML file, or the folder of a run (path or s3://)")]
Set = Annotated[list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="override one value, as in method.alpha=0.5")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in run_dir")]
ShowForget = Annotated[bool, typer.Option("--show-forget", help="put pictures of the forget set into the report")]


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 0, with 2 on a user's mistake, with 130 on Ctrl-C."""
    try:
        app(argv)
    except UnlearnError as e:
        from unlearn.console import err

        err.print(f"[red]error:[/] {_escape(str(e))}", soft_wrap=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and exit", is_eager=True)] = False):
    if version:
        typer.echo(f"unlearn {__version__}")
        raise typer.Exit


@app.command()
def run(
    config: Config, overrides: Set = (), resume: Resume = False, show_forget: ShowForget = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, also against the cluster; train and write nothing")] = False,
    memory: Memory = None, gpu: Gpu = None, mfu: Mfu = None,
):  # fmt: skip
    """Unlearn, evaluate and write the report.

    Example: `unlearn run jobs/configs/demo_fashion.yaml --set method.alpha=0.5 --set run_dir=runs/half`
    """
    settings = _load(config, overrides)
    if dry_run:
        return _dry_run(settings, resume, memory, gpu, mfu)
    _train(settings, resume)
    if not settings.method.name.startswith("pretrain"):  # which has no original to compare with
        _evaluate(settings, show_forget)


@app.command()
def pretrain(
    config: Config, overrides: Set = (), resume: Resume = False,
    front: Annotated[bool, typer.Option("--front", help="train the frozen front end (a tokenizer) instead, which comes first")] = False,
):  # fmt: skip
    """Train a model from nothing (method `pretrain`): the models that others start from, and retrained oracles.

    Example: `unlearn pretrain jobs/configs/pretrain_fashion.yaml`
    """
    settings = _load(config, [*overrides, "method.name=pretrain_front" if front else "method.name=pretrain"])
    _train(settings, resume)


@app.command()
def evaluate(config: Config, overrides: Set = (), show_forget: ShowForget = False):
    """Measure a finished run again: metrics.json and report.html in its folder.

    Example: `unlearn evaluate runs/half --set evaluation.limit=500`
    """
    _evaluate(_load(config, overrides), show_forget)


@app.command()
def report(config: Config, show_forget: ShowForget = False):
    """Write report.html anew from what a run has measured.

    Example: `unlearn report runs/half --show-forget`
    """
    from jobs import evaluate as job
    from unlearn.console import out

    out.print(f"report: {job.report(_load(config), show_forget)}", soft_wrap=True)


@app.command()
def demo(
    data: Annotated[str | None, typer.Option(help="other shards to train and to measure on")] = None,
    model: Annotated[str | None, typer.Option(help="weights of the model to unlearn, for those shards")] = None,
    forget: Annotated[list[str] | None, typer.Option(help="a class to forget, may be repeated; default: half of the classes")] = None,
    run_dir: Annotated[str | None, typer.Option(help="where to write; default: a new folder in runs/")] = None,
    overrides: Set = (),
    resume: Resume = False,
    show_forget: Annotated[bool | None, typer.Option(help="pictures of the forget set; default: for the embedded images only")] = None,
):
    """Forget half of the classes of an embedded data set with two workers: minutes on a laptop, no download.

    Example: `unlearn demo`, or `unlearn demo --data s3://bucket/shards --model model.safetensors --forget cat`
    """
    from jobs.demo import demo_config

    settings = _warned(demo_config(data, model, forget, run_dir, overrides))
    _train(settings, resume)
    _evaluate(settings, data is None if show_forget is None else show_forget)


app.command()(submit)
app.command()(plan)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="weights: the folder `model` of a run, or a public checkpoint")],
    dest: Annotated[str, typer.Argument(help="a new folder, or s3://bucket/prefix")],
    family: Annotated[str | None, typer.Option(help="the family, where the weights do not say it")] = None,
    variant: Annotated[str | None, typer.Option(help="the named shape, where the weights do not say it")] = None,
):
    """Write a model as other libraries read it: a folder of diffusers (diffusion, vqgan) or transformers (mae).

    Example: `unlearn convert runs/half/model half-diffusers`
    """
    from unlearn.config import Model
    from unlearn.console import out
    from unlearn.models import weights

    weights.convert(Model(family=family or weights.family(model), variant=variant, weights=model), dest)
    out.print(f"written: {dest}", soft_wrap=True)


@app.command()
def models():
    """List the model families and their named shapes, with the parameters of their parts."""
    from rich.table import Table

    from unlearn.console import out
    from unlearn.models import base

    table = Table("family", "variant", "image", "encoder", "decoder", "front", box=None)
    for family in base.MODELS:
        for variant in base.adapter(family).variants:
            model = base.shape(family, variant)
            parts = (model.encoder, model.decoder, model.front)
            counts = (sum(p.numel() for p in part.parameters()) / 1e6 if part is not None else 0 for part in parts)
            table.add_row(family, variant, f"{model.options.image_size} px", *(f"{n:,.1f} M" if n else "-" for n in counts))
    out.print(table)


@app.command()
def methods():
    """List the methods of forgetting."""
    from rich.table import Table

    from unlearn.console import out
    from unlearn.methods import base

    table = Table("method", "what it does", box=None)
    for name in base.METHODS:
        table.add_row(name, (base.method_class(name).__doc__ or "").strip().splitlines()[0])
    out.print(table)


@shards_app.command()
def build(
    src: Annotated[str, typer.Argument(help="a folder, or a tar, of CLASS/FILE images")],
    dest: Annotated[str, typer.Argument(help="an empty folder, or s3://bucket/prefix")],
    split: Annotated[str | None, typer.Option(help="take only images below a folder of this name, as in train/CLASS/FILE")] = None,
    shard_mib: Annotated[int, typer.Option(help="size of one shard")] = 256,
    rows_per_group: Annotated[int, typer.Option(help="images of one row group, the unit of reading")] = 256,
):
    """Pack images into shards; the encoded images are kept as they are.

    Example: `unlearn shards build imagenet.tar s3://bucket/imagenet --split train`
    """
    from unlearn.console import progress
    from unlearn.data import packing

    with progress("packing") as advance:
        packing.build(src, dest, split, rows_per_group, shard_mib << 20, lambda rows, total: advance(rows, total, "images"))
    inspect(dest)


@shards_app.command()
def index(uri: Annotated[str, typer.Argument(help="folder of .parquet files with `image` and `label`")]):
    """Write the manifest of shards that exist already; nothing is converted."""
    from unlearn.data import shards

    shards.index(uri)
    inspect(uri)


@shards_app.command()
def verify(
    uri: Annotated[str, typer.Argument(help="folder of shards")],
    threads: Annotated[int, typer.Option(help="decoding threads")] = 4,
):
    """Check every checksum and decode every image; names what is damaged and exits with 2."""
    from unlearn.console import out, progress
    from unlearn.data import checking

    with progress("verifying") as advance:
        rows = checking.verify(uri, threads, lambda done, total: advance(done, total, "images"))
    out.print(f"{uri}: {rows} images, every checksum and every image is good", soft_wrap=True)


@shards_app.command()
def inspect(uri: Annotated[str, typer.Argument(help="folder of shards")]):
    """Tell what shards hold: images, bytes, classes, columns."""
    from rich.table import Table

    from unlearn.console import out
    from unlearn.data import checking

    about = checking.inspect(uri)
    table = Table("", "", box=None, show_header=False)
    for key, value in about.items():
        table.add_row(key, str(value))
    out.print(table)


@config_app.command()
def check(config: Config, overrides: Set = ()):
    """Check a configuration, its data, its sets and its weights, without training."""
    from jobs.train import check as check_all
    from unlearn.console import out

    settings = _load(config, overrides)
    for name, about in check_all(settings).items():
        out.print(f"{name}: {about['images']} images of {len(about['classes'])} classes")
    out.print(f"{config}: good, hash {settings.hash()[:12]}", soft_wrap=True)


@config_app.command()
def show(config: Config, overrides: Set = ()):
    """Print a configuration with all defaults."""
    from unlearn.config import dump

    typer.echo(dump(_load(config, overrides)))


@config_app.command()
def schema():
    """Print the JSON schema of configurations: every key, its meaning and its default."""

    from unlearn.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def _load(source: str, overrides: list[str] = ()):
    from unlearn import config
    from unlearn.data.storage import Storage

    _check_environment()
    if source.startswith("env:"):  # where `unlearn submit` has put it
        if (variable := source.removeprefix("env:")) not in os.environ:
            raise ConfigError(f"{source}: this variable is not set; a configuration is expected in it")
        return _warned(config.read(os.environ[variable], source, overrides))
    if Path(source).suffix in (".yaml", ".yml") and "://" not in source:
        return _warned(config.load(source, overrides))
    storage = Storage(source)
    if not storage.is_file("config.yaml"):
        raise ConfigError(f"{source}: neither a YAML file nor the folder of a run (no config.yaml in it)")
    # The folder that was named is meant, also where it is a copy of the one that its config names.
    overrides = [f"run_dir={json.dumps(source)}", *overrides]
    return _warned(config.read(storage.read("config.yaml").decode(), f"{source}/config.yaml", overrides))


def _check_environment() -> None:
    """That a job finds the variables that `unlearn submit --env` has named. Raises ConfigError."""
    missing = [name for name in os.environ.get("UNLEARN_REQUIRED_ENV", "").split(",") if name and name not in os.environ]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set where the job runs, and it was submitted with --env {missing[0]}; set it there")


def _warned(settings):
    from unlearn.config import ignored
    from unlearn.console import warn

    for text in ignored(settings):
        warn(text)
    return settings


def _train(settings, resume: bool) -> None:
    from jobs import train as job
    from unlearn.console import out, progress, training

    with _resumable(settings), progress("training") as advance:
        model = job.train(settings, resume, lambda row: advance(*training(row)))
    out.print(f"model: {model}", soft_wrap=True)


def _evaluate(settings, show_forget: bool) -> None:
    from jobs import evaluate as job
    from unlearn.console import out, progress
    from unlearn.data.storage import Storage
    from unlearn.evaluation.report import NAME, table

    with _resumable(settings, measuring=True), progress("evaluating") as advance:
        metrics = job.evaluate(settings, lambda done, total: advance(done, total, ""), show_forget)
    out.print(table(metrics))
    out.print(f"report: {Storage(settings.run_dir).where(NAME)}", soft_wrap=True)


def _dry_run(settings, resume: bool, memory: str | None, gpu: str | None, mfu: float | None) -> None:
    from jobs import plan as job
    from unlearn.cli_plan import show
    from unlearn.console import out

    report = job.dry_run(settings, resume, memory, gpu, mfu)
    for name, images in report.sizes.items():
        out.print(f"{name}: {images:,} images")
    show(report)
    out.print(f"{settings.name}: good, hash {settings.hash()[:12]}; nothing was written")


@contextlib.contextmanager
def _resumable(settings, measuring: bool = False) -> Iterator[None]:
    """On Ctrl-C say how to go on, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        from unlearn.console import err
        from unlearn.training.checkpoint import Checkpoints

        if measuring:
            err.print(f"\nstopped: the model is there; measure it with\n  unlearn evaluate {settings.run_dir}", soft_wrap=True)
            sys.exit(130)
        steps = Checkpoints(settings.run_dir, settings.training.keep_checkpoints).steps()
        saved = f"step {steps[-1]} is saved; go on with" if steps else "no checkpoint was written yet; start again with"
        command = "pretrain" if settings.method.name.startswith("pretrain") else "run"
        command += " --front" if settings.method.name == "pretrain_front" else ""
        resume = " --resume" if steps else ""
        err.print(f"\nstopped: {saved}\n  unlearn {command} {settings.run_dir}{resume}", soft_wrap=True)
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
