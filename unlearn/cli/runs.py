"""The commands that train and measure: `unlearn run`, `pretrain`, `evaluate`, `report`, `demo`."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from unlearn.cli.options import Config, Gpu, Memory, Mfu, Resume, Set, ShowForget, load, warned

if TYPE_CHECKING:
    from unlearn.config import RunConfig
    from unlearn.run import Run


def run(
    config: Config, overrides: Set = [], resume: Resume = False, show_forget: ShowForget = False,  # noqa: B006  read only
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, also against the cluster; train and write nothing")] = False,
    memory: Memory = None, gpu: Gpu = None, mfu: Mfu = None,
):  # fmt: skip
    """Unlearn, evaluate and write the report.

    Example: `unlearn run jobs/configs/demo_fashion.yaml --set method.alpha=0.5 --set run_dir=runs/half`
    """
    settings = load(config, overrides)
    if dry_run:
        return _dry_run(settings, resume, memory, gpu, mfu)
    trained = _train(settings, resume)
    if trained.measured:  # a method that has no original has nothing to compare with
        _evaluate(trained, show_forget)


def pretrain(
    config: Config, overrides: Set = [], resume: Resume = False,  # noqa: B006  read only
    first_stage: Annotated[
        bool, typer.Option("--first-stage", "--front", help="train the frozen first stage (a tokenizer) instead, which comes first")
    ] = False,
):  # fmt: skip
    """Train a model from nothing (method `pretrain`): the models that others start from, and retrained oracles.

    Example: `unlearn pretrain jobs/configs/pretrain_fashion.yaml`
    """
    method = "pretrain_first_stage" if first_stage else "pretrain"
    _train(load(config, [*overrides, f"method={{name: {method}}}"]), resume)


def evaluate(config: Config, overrides: Set = [], show_forget: ShowForget = False):  # noqa: B006  read only
    """Measure a finished run again: metrics.json and report.html in its folder.

    Example: `unlearn evaluate runs/half --set evaluation.limit=500`
    """
    from unlearn.run import resolve

    _evaluate(resolve(load(config, overrides), measured=True), show_forget)


def report(config: Config, show_forget: ShowForget = False):
    """Write report.html anew from what a run has measured.

    Example: `unlearn report runs/half --show-forget`
    """
    from jobs.evaluate import write_report
    from unlearn.cli.console import out
    from unlearn.run import resolve

    out.print(f"report: {write_report(resolve(load(config, []), measured=True), show_forget)}", soft_wrap=True)


def demo(
    data: Annotated[str | None, typer.Option(help="other shards to train and to measure on")] = None,
    model: Annotated[str | None, typer.Option(help="weights of the model to unlearn, for those shards")] = None,
    forget: Annotated[list[str] | None, typer.Option(help="a class to forget, may be repeated; default: half of the classes")] = None,
    run_dir: Annotated[str | None, typer.Option(help="where to write; default: a new folder in runs/")] = None,
    overrides: Set = [],  # noqa: B006  read only
    resume: Resume = False,
    show_forget: Annotated[bool | None, typer.Option(help="pictures of the forget set; default: for the embedded images only")] = None,
):
    """Forget half of the classes of an embedded data set with two workers: minutes on a laptop, no download.

    Example: `unlearn demo`, or `unlearn demo --data s3://bucket/shards --model model.safetensors --forget cat`
    """
    from jobs.demo import demo_config

    trained = _train(warned(demo_config(data, model, forget, run_dir, overrides)), resume)
    _evaluate(trained, data is None if show_forget is None else show_forget)


def _train(settings: "RunConfig", resume: bool) -> "Run":
    from jobs import train as job
    from unlearn.cli.console import out, progress, training

    with _resumable(settings), progress("training") as advance:
        prepared = job.prepare(settings, resume)
        model = job.train(prepared, lambda row: advance(*training(row)))
    out.print(f"model: {model}", soft_wrap=True)
    return prepared


def _evaluate(trained: "Run", show_forget: bool) -> None:
    from jobs import evaluate as job
    from unlearn.cli.console import out, progress
    from unlearn.data.storage import Storage
    from unlearn.evaluation.report import NAME, table

    with _resumable(trained.settings, measuring=True), progress("evaluating") as advance:
        metrics = job.evaluate(trained, lambda done, total: advance(done, total, ""), show_forget)
    out.print(table(metrics))
    out.print(f"report: {Storage(trained.folder).where(NAME)}", soft_wrap=True)


def _dry_run(settings: "RunConfig", resume: bool, memory: str | None, gpu: str | None, mfu: float | None) -> None:
    from jobs import plan as job
    from unlearn.cli.console import out
    from unlearn.cli.plan import show

    made = job.dry_run(settings, resume, memory, gpu, mfu)
    for name, images in (made.sizes or {}).items():
        out.print(f"{name}: {images:,} images")
    show(made)
    out.print(f"{settings.name}: good, hash {settings.hash()[:12]}; nothing was written")


@contextlib.contextmanager
def _resumable(settings: "RunConfig", measuring: bool = False) -> Iterator[None]:
    """On Ctrl-C say how to go on, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        from unlearn.cli.console import err
        from unlearn.training.checkpoint import Checkpoints

        if measuring:
            err.print(f"\nstopped: the model is there; measure it with\n  unlearn evaluate {settings.run_dir}", soft_wrap=True)
            sys.exit(130)
        steps = Checkpoints(settings.run_dir, settings.training.keep_checkpoints).steps()
        saved = f"step {steps[-1]} is saved; go on with" if steps else "no checkpoint was written yet; start again with"
        command = "pretrain" if settings.method.name.startswith("pretrain") else "run"
        command += " --first-stage" if settings.method.name == "pretrain_first_stage" else ""
        resume = " --resume" if steps else ""
        err.print(f"\nstopped: {saved}\n  unlearn {command} {settings.run_dir}{resume}", soft_wrap=True)
        sys.exit(130)
