"""What a run needs, as tables: `unlearn plan` and `unlearn run --dry-run`."""

from dataclasses import replace
from typing import Annotated

import typer

from unlearn.cli.options import Gpu, Memory, Mfu, Set, load
from unlearn.errors import UnlearnError

Configs = Annotated[
    list[str], typer.Argument(help="YAML files, or folders of runs (path or s3://)", metavar="CONFIG...")
]


def plan(
    configs: Configs,
    overrides: Set = [],  # noqa: B006  read only
    memory: Memory = None,
    gpu: Gpu = None,
    mfu: Mfu = None,
):
    """Say how much memory a worker needs by ZeRO stage, how long a run takes, and what stage and micro-batch to take.

    Nothing is computed and no weight is read: a ViT-H takes seconds. Where the weights are not here, model.variant says
    the shape.

    Example: `unlearn plan jobs/configs/mae_vit_large_imagenet.yaml --gpu H200`
    """
    from unlearn.cli.console import out
    from unlearn.planning.report import report

    if len(configs) == 1:
        return show(report(load(configs[0], overrides), memory, gpu, mfu))
    failures = []
    for source in configs:
        out.print(f"== {source}", soft_wrap=True)
        try:
            show(report(load(source, overrides), memory, gpu, mfu))
        except UnlearnError as e:
            failures.append(f"{source}: {e}")
    if failures:
        raise UnlearnError("\n".join(failures))


def show(report) -> None:
    """Print a Report of unlearn/planning."""
    from unlearn.cli.console import out

    settings, device = report.settings, report.device
    kind = f"{device.name} (assumed: --gpu and --memory say otherwise)" if device.guessed else device.name
    how = f"{settings.training.dtype}, micro-batch {settings.micro_batch}"
    how += ", checkpointing" if settings.training.activation_checkpointing else ""
    out.print(f"{settings.cluster.workers} worker(s), {kind}, {size(device.memory)} each; {how}", soft_wrap=True)
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(_memory(report))
    out.print(_cost(report))
    if report.advice is None:
        out.print("advice: nothing that can be set here makes it fit; take more or larger devices")
    else:
        out.print(f"advice: {' '.join(report.change()) or 'as it is'}", soft_wrap=True)


def _memory(report):
    from rich.table import Table

    rows = report.rows
    unit, power = ("GiB", 30) if max(row.estimate.total for row in rows) >= 10 << 30 else ("MiB", 20)
    # Checkpointing is the same in all of them.
    heads = [str(replace(row.strategy, checkpointing=False)).replace(" + ", "\n") for row in rows]
    heads[0] += "\n(as asked)"
    table = Table(f"{unit} a worker", *heads, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in rows[0].estimate.device:
        if any(row.estimate.device[name] for row in rows):
            table.add_row(name, *(_number(row.estimate.device[name], power) for row in rows))
    table.add_row("sum", *(_number(row.estimate.total, power) for row in rows))
    if any(row.estimate.host for row in rows):
        table.add_row("besides, on the host", *(_number(row.estimate.host, power) for row in rows))
    table.add_row(
        "image cache" + (", on the host" if report.device.cuda else ""), *[_number(report.caches, power)] * len(rows)
    )
    table.add_row("fits", *("yes" if row.fits else "no" for row in rows))
    table.add_row("largest micro-batch", *(str(row.largest or "-") for row in rows))
    return table


def _number(count: int, power: int) -> str:
    return f"{count / (1 << power):.1f}" if count else "-"


def _cost(report):
    from rich.table import Table

    work, cost, device = report.work, report.cost, report.device
    table = Table("", "", box=None, show_header=False)
    table.add_row("host memory of a worker while it starts", size(report.host))
    table.add_row("FLOPs of a step", f"{work.step + work.first_stage:.3g}, {work.images} images")
    if work.steps:
        table.add_row("FLOPs of the run", f"{(work.step + work.first_stage) * work.steps:.3g}, {work.steps:,} steps")
    table.add_row(
        "expected",
        f"{cost.images:,.0f} images/s, {cost.step:.3g} s a step, "
        f"at {device.share:.0%} of {device.peak:.3g} FLOP/s a worker",
    )
    table.add_row("at the floor", f"{cost.floor:,.0f} images/s")
    if cost.total is None:
        table.add_row("time", "unknown: the data is not here, and epochs are passes over it")
    else:
        parts = {
            "start": cost.start,
            "latent cache": cost.once,
            "training": cost.training,
            "evaluation": cost.evaluation,
        }
        table.add_row(
            "time",
            f"{span(cost.total)}: " + ", ".join(f"{name} {span(value)}" for name, value in parts.items() if value),
        )
    return table


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


def span(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
