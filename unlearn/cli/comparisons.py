"""The commands of the leaderboard: `unlearn oracle`, which trains the reference, and `unlearn compare`."""

from typing import Annotated

import typer

from unlearn.cli.options import Config, Set, load


def oracle(
    config: Config, overrides: Set = [],  # noqa: B006  read only
    without: Annotated[str | None,
        typer.Option("--without", metavar="RUN.yaml",
            help="the run whose forget set is left out; default: data.forget of CONFIG")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="how many oracles; their seeds count from that of CONFIG")] = 1,
    folder: Annotated[str | None,
        typer.Option("--dir",
            help="where they go, each in seed-N; default: run_dir of CONFIG, with -oracle behind it")] = None,
):  # fmt: skip
    """Train the model of a pretraining configuration again without the forget set: the reference of unlearning.

    What is there already stays, and what was stopped goes on. Example:
    `unlearn oracle jobs/configs/pretrain_fashion.yaml --without jobs/configs/demo_fashion.yaml --seeds 3`
    """
    from jobs import oracle as job
    from jobs.owner import owned
    from unlearn import signals
    from unlearn.cli.console import out, progress, training
    from unlearn.config import location

    pretraining = load(config, overrides)
    forgetting = load(without, []) if without else pretraining
    place = location(folder or f"{pretraining.run_dir}-oracle")
    runs = [job.settings(pretraining, forgetting, pretraining.seed + number, place) for number in range(seeds)]
    models = []
    for run in runs:
        try:
            with owned(run.run_dir, "oracle") as lease, progress(run.name) as advance:
                models.append(job.oracle(run, lambda row: advance(*training(row)), lease.check))
        except signals.Stopped as e:
            e.hint = "what is trained stays: the same command goes on"
            raise
    out.print(f"evaluation.oracle: [{', '.join(models)}]", soft_wrap=True, highlight=False, markup=False)


def compare(
    source: Annotated[str,
        typer.Argument(metavar="COMPARE.yaml", help="a YAML file, or the folder of a comparison (path or s3://)")],
    overrides: Annotated[
        list[str],
        typer.Option("--set", "-s", metavar="KEY=VALUE",
            help="override one, as in concurrent=2, run.training.steps=100")
    ] = [],  # noqa: B006  read only
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run again what has failed")] = False,
    only_report: Annotated[bool,
        typer.Option("--report", help="run nothing: write the table and the page of what there is")] = False,
):  # fmt: skip
    """Compare methods, each with the same budget, seeds and tuning, or go on with it: a leaderboard against the
    retrained oracle.

    Example: `unlearn compare jobs/configs/compare_fashion.yaml --set concurrent=2`
    """
    from jobs import compare as job
    from jobs.owner import owned
    from unlearn import signals
    from unlearn.cli.console import out, progress
    from unlearn.cli.options import required
    from unlearn.data.storage import Storage
    from unlearn.search import leaderboard_page
    from unlearn.search.compare import load

    required()
    comparison = load(source, overrides)
    with owned(comparison.compare_dir, "compare") as lease:
        if only_report:
            document = job.report(comparison)
        else:
            try:
                job.prepare(comparison)
                with progress("runs") as advance:
                    document = job.compare(
                        comparison, lambda part, done, total: advance(done, total, part), lease.check, retry_failed
                    )
            except signals.Stopped as e:
                e.hint = f"what has ended stays: unlearn compare {comparison.compare_dir}"
                raise
    out.print(leaderboard_page.table(document, out.width))
    out.print(f"page: {Storage(comparison.compare_dir).where(leaderboard_page.NAME)}", soft_wrap=True)
