"""What a run needs, as tables: `unlearn plan` and `unlearn run --dry-run`."""

from dataclasses import replace

from unlearn.cli.options import Config, Gpu, Memory, Mfu, Set, load


def plan(
    config: Config,
    overrides: Set = [],  # noqa: B006  read only
    memory: Memory = None,
    gpu: Gpu = None,
    mfu: Mfu = None,
):
    """Say what a run needs of every worker's memory, by ZeRO stage, how long it takes, and which stage and micro-batch to take.

    Nothing is computed and no weight is read: a ViT-H takes seconds.

    Example: `unlearn plan jobs/configs/mae_vit_large_imagenet.yaml --gpu H200`
    """
    from unlearn.planning.report import report

    show(report(load(config, overrides), memory, gpu, mfu))


def show(report) -> None:
    """Print a Report of unlearn/planning."""
    from unlearn.cli.console import out

    run, device = report.run, report.device
    kind = device.name if device.seen or not device.cuda else f"{device.name} (assumed: --gpu or --memory says otherwise)"
    how = f"{run.training.dtype}, micro-batch {run.micro_batch}" + (", checkpointing" if run.training.activation_checkpointing else "")
    out.print(f"{run.cluster.workers} worker(s), {kind}, {size(device.memory)} each; {how}", soft_wrap=True)
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
    table.add_row("image cache" + (", on the host" if report.device.cuda else ""), *[_number(report.caches, power)] * len(rows))
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
    table.add_row("expected", f"{cost.images:,.0f} images/s, {cost.step:.3g} s a step, at {device.share:.0%} of {device.peak:.3g} FLOP/s a worker")
    table.add_row("at the floor", f"{cost.floor:,.0f} images/s")
    if cost.total is None:
        table.add_row("time", "unknown: the data is not here, and epochs are passes over it")
    else:
        parts = {"start": cost.start, "latent cache": cost.once, "training": cost.training, "evaluation": cost.evaluation}
        table.add_row("time", f"{span(cost.total)}: " + ", ".join(f"{name} {span(value)}" for name, value in parts.items() if value))
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
