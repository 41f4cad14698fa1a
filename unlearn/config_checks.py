"""What a whole configuration contradicts or ignores: checks across its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unlearn.config import Part, RunConfig


def contradictions(run: RunConfig) -> Iterator[str]:
    """Every pair of values that cannot both be meant, one sentence each."""
    t, c, d = run.training, run.cluster, run.data
    if (t.steps is None) == (t.epochs is None):
        yield "training: give exactly one of steps and epochs"
    if t.engine == "torch" and c.workers != 1:
        yield f"training.engine torch is one process: set cluster.workers to 1 (now {c.workers})"
    if t.engine == "deepspeed" and c.workers > 1 and c.gpus_per_worker not in (0, 1):
        yield f"cluster.gpus_per_worker {c.gpus_per_worker:g}: a worker drives one GPU; give 0 or 1, and more workers"
    if c.min_workers and c.min_workers > c.workers:
        yield f"cluster.min_workers {c.min_workers} is more than cluster.workers {c.workers}"
    if c.min_workers and t.micro_batch_size is None:
        yield (
            "cluster.min_workers: give training.micro_batch_size too, which must not change with the number of workers"
        )
    if t.micro_batch_size is None and t.batch_size % c.workers:
        yield f"training.batch_size {t.batch_size} does not divide among {c.workers} workers"
    elif t.batch_size % (run.micro_batch * c.workers):
        yield (
            f"training.batch_size {t.batch_size} is not a multiple of micro_batch_size x workers = {run.micro_batch} "
            f"x {c.workers}"
        )
    if run.evaluation.weights == "ema" and t.ema is None:
        yield "evaluation.weights ema: the run keeps no moving average; give training.ema, as 0.9999"
    if run.micro_batch < 2 and d.forget is not None and t.forget_fraction:
        yield "training.micro_batch_size 1 cannot hold one retain and one forget row: give 2 or more"
    if d.retain is not None and d.proxy is not None:
        yield "data: give retain or proxy, not both: the proxy set takes the retain role"
    for name, rows in (("forget", d.forget), ("retain", d.retain), ("proxy", d.proxy)):
        if rows is not None and rows.ids_column and not rows.ids_from:
            yield f"data.{name}.ids_column is given without ids_from: name the file that has the column"
    if (d.proxy_data or d.proxy_split) and d.proxy is None:
        yield "data.proxy_data is given without data.proxy: say which rows of it to use"


def ignored(run: RunConfig) -> list[str]:
    """What differs from the defaults and this run will not look at, one sentence each."""
    t, c, e = run.training, run.cluster, run.evaluation
    notes = []

    def note(part: Part, where: str, keys: tuple[str, ...], why: str) -> None:
        changed = (key for key in keys if getattr(part, key) != type(part).model_fields[key].default)
        notes.extend(f"{where}.{key} is ignored: {why}" for key in changed)

    if t.engine == "torch":
        note(t, "training", ("zero_stage", "offload_optimizer"), "engine torch is one plain process")
        note(c, "cluster", ("address", "max_failures", "min_workers"), "engine torch does not use Ray to train")
    elif t.offload_optimizer and t.zero_stage == 0:
        note(
            t, "training", ("offload_optimizer",), "there is nothing to offload without ZeRO; set zero_stage 1, 2 or 3"
        )
    if run.method.name.startswith("pretrain"):
        note(t, "training", ("forget_fraction",), "pretrain sees the retain set alone")
    if t.steps and t.warmup_steps >= t.steps:
        notes.append(
            f"training.warmup_steps {t.warmup_steps} is not shorter than the run's {t.steps} steps: lr never gets to "
            "its value"
        )
    if e.features == "efficientnet_lite0":
        note(e, "evaluation", ("features_weights",), "efficientnet_lite0 brings its own")
    if e.features != "inception":
        note(e, "evaluation", ("resize",), f"{e.features} is given images as it was trained; it is for inception")
    return notes
