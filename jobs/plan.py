"""The dry run: everything that `unlearn run` would check, and whether it would fit; behind `unlearn run --dry-run`."""

from jobs import train
from jobs.cluster import reach
from unlearn import config
from unlearn.errors import ConfigError
from unlearn.planning import search
from unlearn.planning.report import Report, report


def dry_run(
    settings: config.RunConfig,
    resume: bool = False,
    size: str | None = None,
    gpu: str | None = None,
    mfu: float | None = None,
) -> Report:
    """Check what `unlearn run` would check, and whether it would fit; nothing is written and nothing is trained.

    size, gpu, mfu: as for unlearn.planning.report. Raises UnlearnError as `jobs.train.ready` does, and where the
    cluster has too little.
    """
    train.ready(settings, resume)
    cluster = settings.cluster
    kind = reach(cluster, cluster.min_workers or cluster.workers) if settings.training.engine == "deepspeed" else None
    planned = report(settings, size, gpu or (kind if cluster.gpus_per_worker else None), mfu)
    if not planned.rows[0].fits:
        raise ConfigError(_too_large(planned))
    return planned


def _too_large(planned: Report) -> str:
    row, gib = planned.rows[0], 2**30
    needed = row.estimate.total + (0 if planned.device.cuda else row.estimate.host + planned.caches)
    message = (
        f"a worker needs {needed / gib:.3g} GiB at its worst moment ({row.strategy}, micro-batch "
        f"{planned.settings.micro_batch}); "
        f"of the {planned.device.memory / gib:.3g} GiB of {planned.device.name} {search.USABLE:.0%} can be used: "
    )
    if planned.advice is None:
        remedy = "nothing that can be set here makes it fit; take more or larger devices, or fewer workers a machine"
    else:
        remedy = f"add {' '.join(planned.change())}"
    return message + remedy
