"""The commands that train and measure: `unlearn run`, `pretrain`, `evaluate`, `report`, `demo`."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from unlearn import signals
from unlearn.cli.options import Config, Gpu, Memory, Mfu, Resume, Set, ShowForget, load, warned
from unlearn.errors import ConfigError

if TYPE_CHECKING:
    from unlearn.config import RunConfig
    from unlearn.lease import Lease
    from unlearn.run import Run


def run(
    config: Config, overrides: Set = [],  # noqa: B006  read only
    resume: Resume = False, show_forget: ShowForget = False,
    dry_run: Annotated[bool,
        typer.Option("--dry-run", help="check everything, also against the cluster; train and write nothing")] = False,
    no_evaluate: Annotated[bool,
        typer.Option("--no-evaluate", help="train alone; `unlearn evaluate` measures later")] = False,
    memory: Memory = None, gpu: Gpu = None, mfu: Mfu = None,
):  # fmt: skip
    """Unlearn, evaluate and write the report.

    Example: `unlearn run jobs/configs/demo_fashion.yaml --set method.alpha=0.5 --set run_dir=runs/half`
    """
    settings = load(config, overrides)
    if dry_run:
        return _dry_run(settings, resume, memory, gpu, mfu)
    with _owned(settings, "run") as lease:
        trained = _train(settings, resume, lease)
        if trained.measured and not no_evaluate:  # a method that has no original has nothing to compare with
            _evaluate(trained, show_forget, lease)


def pretrain(
    config: Config, overrides: Set = [], resume: Resume = False,  # noqa: B006  read only
    first_stage: Annotated[
        bool,
        typer.Option("--first-stage", "--front",
            help="train the frozen first stage (a tokenizer) instead, which comes first")
    ] = False,
):  # fmt: skip
    """Train a model from nothing (method `pretrain`): the models that others start from, and retrained oracles.

    Example: `unlearn pretrain jobs/configs/pretrain_fashion.yaml`
    """
    method = "pretrain_first_stage" if first_stage else "pretrain"
    settings = load(config, [*overrides, f"method={{name: {method}}}"])
    with _owned(settings, "pretrain") as lease:
        _train(settings, resume, lease)


def evaluate(config: Config, overrides: Set = [], show_forget: ShowForget = False):  # noqa: B006  read only
    """Measure a finished run again: metrics.json and report.html in its folder.

    Example: `unlearn evaluate runs/half --set evaluation.limit=500`
    """
    settings = load(config, overrides)
    with _owned(settings, "evaluate") as lease, _measuring(settings):
        from unlearn.run import resolve

        _evaluate(resolve(settings, measured=True), show_forget, lease)


def report(config: Config, show_forget: ShowForget = False):
    """Write report.html anew from what a run has measured.

    Example: `unlearn report runs/half --show-forget`
    """
    from unlearn.cli.console import out

    settings = load(config, [])
    with _owned(settings, "report"):
        from jobs.evaluate import write_report
        from unlearn.run import resolve

        written = write_report(resolve(settings, measured=True), show_forget)
    out.print(f"report: {written}", soft_wrap=True)


def demo(
    data: Annotated[str | None, typer.Option(help="other shards to train and to measure on")] = None,
    model: Annotated[str | None, typer.Option(help="weights of the model to unlearn, for those shards")] = None,
    forget: Annotated[
        list[str] | None, typer.Option(help="a class to forget, may be repeated; default: half of the classes")
    ] = None,
    run_dir: Annotated[str | None, typer.Option(help="where to write; default: a new folder in runs/")] = None,
    overrides: Set = [],  # noqa: B006  read only
    resume: Resume = False,
    show_forget: Annotated[
        bool | None, typer.Option(help="pictures of the forget set; default: for the embedded images only")
    ] = None,
    cycle: Annotated[
        bool,
        typer.Option("--cycle", help="the story of deletion requests: two cycles, two certified releases, one page"),
    ] = False,
):
    """Forget half of the classes of an embedded data set with two workers: minutes on a laptop, no download.

    Example: `unlearn demo`, or `unlearn demo --data s3://bucket/shards --model model.safetensors --forget cat`
    """
    if cycle:
        if data or model or forget or show_forget:
            raise ConfigError("--cycle has its own data and requests: --run-dir and --set go with it")
        return _demo_cycle(run_dir, overrides)
    from jobs.demo import demo_config

    settings = warned(demo_config(data, model, forget, run_dir, overrides))
    with _owned(settings, "demo") as lease:
        trained = _train(settings, resume, lease)
        _evaluate(trained, data is None if show_forget is None else show_forget, lease)


def _demo_cycle(folder: str | None, overrides: list[str]) -> None:
    from jobs import demo_cycle as job
    from unlearn.cli.console import out
    from unlearn.cli.cycles import shown

    cycle = job.demo_cycle(folder, overrides)
    try:
        page = job.story(cycle, lambda text: out.print(text, soft_wrap=True), shown)
    except signals.Stopped as e:
        e.hint = f"go on with: unlearn demo --cycle --run-dir {cycle.cycle_dir.removesuffix('/cycles')}"
        raise
    out.print(f"\nThe whole history on one page: {page}", soft_wrap=True)


def _train(settings: "RunConfig", resume: bool, lease: "Lease") -> "Run":
    with _training(settings):
        from jobs import train as job
        from unlearn.cli.console import out, progress, training

        with progress("training") as advance:
            prepared = job.prepare(settings, resume)
            model = job.train(prepared, lambda row: advance(*training(row)), lease.check)
    out.print(f"model: {model}", soft_wrap=True)
    return prepared


def _evaluate(trained: "Run", show_forget: bool, lease: "Lease") -> None:
    with _measuring(trained.settings):
        from jobs import evaluate as job
        from unlearn.cli.console import out, progress
        from unlearn.data.storage import Storage
        from unlearn.evaluation.report import NAME, table

        with progress("evaluating") as advance:
            metrics = job.evaluate(trained, lambda done, total: advance(done, total, ""), show_forget, lease.check)
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
def _owned(settings: "RunConfig", command: str) -> Iterator["Lease"]:
    """The run folder is this process's until the command is over."""
    from jobs.owner import owned

    with owned(settings.run_dir, command) as lease:
        yield lease


@contextlib.contextmanager
def _training(settings: "RunConfig") -> Iterator[None]:
    """Where the process is asked to stop, say how to go on."""
    try:
        yield
    except signals.Stopped as e:
        from unlearn import patience
        from unlearn.data.storage import Storage
        from unlearn.errors import StorageError
        from unlearn.training.checkpoint import Checkpoints

        try:
            with patience.at_most(0):  # who is asked to stop has little time
                steps = Checkpoints(settings.run_dir, settings.training.keep_checkpoints).steps()
                written = bool(steps) or Storage(settings.run_dir).is_file("config.yaml")
            if not written:
                raise
        except StorageError:  # out of reach: --resume finds what there is
            steps = []
        command = "pretrain" if settings.method.name.startswith("pretrain") else "run"
        command += " --first-stage" if settings.method.name == "pretrain_first_stage" else ""
        saved = f"step {steps[-1]} is saved" if steps else "no checkpoint was written yet"
        e.hint = f"{saved}; {_again(f'unlearn {command} {settings.run_dir} --resume')}"
        raise


@contextlib.contextmanager
def _measuring(settings: "RunConfig") -> Iterator[None]:
    """The same while a model is measured."""
    try:
        yield
    except signals.Stopped as e:
        again = _again(f"unlearn evaluate {settings.run_dir}")
        e.hint = f"the model is there; {again}, with the same --set evaluation.* where any was given"
        raise


def _again(command: str) -> str:
    job = os.environ.get(signals.JOB)
    return f"go on with: {f'unlearn jobs resume {job}' if job else command}"
