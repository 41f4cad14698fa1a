"""Train: check, train on Ray or in one process, export; behind `unlearn run` and `unlearn pretrain`."""

import logging
import socket
import tempfile
from collections.abc import Callable

from jobs.cluster import check_machine, connected
from jobs.owner import how_to_go_on
from unlearn import config, signals
from unlearn import log as logs
from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError, ClusterError, ConfigError, StorageError, TrainingError, UnlearnError
from unlearn.evaluation import features, perceptual
from unlearn.methods import base as methods
from unlearn.models import base as models
from unlearn.models import weights
from unlearn.run import Run, resolve
from unlearn.training import engine, metrics
from unlearn.training.checkpoint import Checkpoints
from unlearn.training.export import export
from unlearn.training.loop import worker

log = logging.getLogger(__name__)

# Called with logged rows: all of them on plain torch, the newest ones from Ray.
Progress = Callable[[dict], None]
# In the run folder: the user's mistake that stopped the workers.
FAILURE = "failure.txt"


def check(settings: config.RunConfig) -> Run:
    """Check data, sets, method, weights and what the evaluation needs; nothing is written. Returns the run, all of it
    resolved.

    Raises UnlearnError: no such data or class, an empty or overlapping set, weights that do not fit.
    """
    check_method(settings)
    run = resolve(settings)
    methods.create(settings.method).restarts(run.steps)
    check_models(settings)
    return run


def check_method(settings: config.RunConfig) -> None:
    """Check the method's options, and what it needs. Raises ConfigError."""
    method = methods.create(settings.method)
    method.check(models.adapter(settings.model.family))
    engine.check(settings.training, method)
    if settings.model.weights is None and method.needs_forget:
        raise ConfigError(f"model.weights is missing: {settings.method.name} starts from a trained model")
    if method.needs_forget and settings.data.forget is None:
        raise ConfigError("data.forget is missing: say which images are to be forgotten")
    if method.needs_forget and not settings.training.forget_fraction:
        raise ConfigError(
            f"training.forget_fraction is 0: {settings.method.name} needs forget rows in every micro-batch"
        )


def check_models(settings: config.RunConfig) -> None:
    """Check what depends on the models alone: their weights, and what the evaluation needs. Raises UnlearnError."""
    built = weights.build(settings.model, settings.seed)
    if settings.data.latent_cache and built.first_stage is not None and settings.data.augment != "none":
        raise ConfigError(
            "data.augment: with data.latent_cache every image is seen as it is; set augment to none, or leave out "
            "data.latent_cache"
        )
    if getattr(built.options, "norm_pix_loss", False):
        log.warning(
            "these weights say pixels normalised by patch: they unlearn, but their pictures, and figures of these, "
            "mean little"
        )
    if methods.method_class(settings.method.name).needs_forget:  # then there will be something to evaluate
        features.check(settings.evaluation.features, settings.evaluation.features_weights)
        if settings.evaluation.lpips_weights:
            perceptual.check(settings.evaluation.lpips_weights, built.options.image_size)
        for oracle in settings.evaluation.oracles:
            weights.build(settings.model.model_copy(update={"weights": oracle}))


def prepare(settings: config.RunConfig, resume: bool = False) -> Run:
    """Check everything before anything expensive starts, and write the configuration to the run folder.

    Raises UnlearnError as `ready` does, and where the run folder cannot be written.
    """
    run = ready(settings, resume)
    sets = {name: f"{len(rows)} images (manifest {rows.manifest.hash[:12]})" for name, rows in run.sets.items()}
    measured = {f"{name} to measure": f"{len(rows)} images" for name, rows in run.measured.items()}
    about = ", ".join(f"{name} {what}" for name, what in (sets | measured).items())
    log.info("%s resolved: config %s, %s steps, %s", settings.name, settings.hash()[:12], run.steps, about)
    Storage(settings.run_dir).write("config.yaml", config.dump(settings).encode(), private=settings.names_rows)
    return run


def ready(settings: config.RunConfig, resume: bool = False) -> Run:
    """Check everything that can be checked before the run; nothing is written.

    Raises UnlearnError as `check` does, where the run folder is in use, and where this machine has too little.
    """
    run = check(settings)
    checkpoints = Checkpoints(settings.run_dir, settings.training.keep_checkpoints)
    steps = checkpoints.steps()
    if steps and not resume:
        raise CheckpointError(
            f"{settings.run_dir} holds a run that has come to step {steps[-1]}: {how_to_go_on()}, or give another "
            "run_dir"
        )
    if steps:
        checkpoints.state(steps[-1]).check(run, settings.run_dir)
    check_machine(settings.cluster, settings.cluster.min_workers or settings.cluster.workers)
    return run


def train(run: Run, progress: Progress = lambda row: None, check: Callable[[], None] = lambda: None) -> str:
    """Train and export a prepared run, going on from its newest checkpoint. Returns the URI of the model folder.

    check: asked again and again; where it raises UnlearnError, as a lease that is lost does, the run is stopped and
    that is raised.
    """
    if run.settings.training.engine == "torch":

        def report(row: dict) -> None:
            check()
            progress(row)

        worker(run, report)
    else:
        _on_ray(run, progress, check)
    check()
    if rows := metrics.read(run.folder):
        if doubt := methods.create(run.settings.method).doubt(rows[-1]):
            log.warning("%s: %s", run.settings.name, doubt)
    uri = export(run)
    log.info("exported %s", uri)
    return uri


def _on_ray(run: Run, progress: Progress, check: Callable[[], None]) -> None:
    cluster = run.settings.cluster
    with (
        connected(cluster, cluster.min_workers or cluster.workers),
        tempfile.TemporaryDirectory(prefix="unlearn-ray-") as scratch,
    ):
        import ray.train

        from jobs.rendezvous import torch_config
        from jobs.trainer import StoppableTrainer

        storage = Storage(run.folder)
        storage.delete(FAILURE)
        trainer = StoppableTrainer(
            _worker,
            train_loop_config={"run": run, "log": logs.level()},
            torch_config=torch_config("nccl" if cluster.gpus_per_worker else "gloo", cluster.timeout),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(cluster.min_workers, cluster.workers) if cluster.min_workers else cluster.workers,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker=resources(cluster),
            ),
            # Ray Train's own records go to a scratch folder: all that a run needs to go on is in its checkpoints.
            run_config=ray.train.RunConfig(
                name=run.settings.name, storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            ),
        )  # fmt: skip
        log.info("%s workers on Ray", cluster.workers)
        try:
            with trainer.fitting(check) as work:
                metrics.follow(run.folder, work, _telling_of_losses(cluster, progress))
                work.result()
            _tell_failure(storage)
        except ray.train.TrainingFailedError as e:
            _tell_failure(storage)
            raise ClusterError(
                f"the workers failed more than cluster.max_failures ({cluster.max_failures}) times: {_last_line(e)}; "
                f"the last checkpoint is good: {how_to_go_on()}"
            ) from e


def _telling_of_losses(cluster: config.Cluster, progress: Progress) -> Progress:
    """`progress` that also says when the run has gone back to a checkpoint, and with how many workers."""
    step, workers = 0, cluster.workers

    def told(row: dict) -> None:
        nonlocal step, workers
        if row.get("workers", 0) > cluster.workers:
            return  # the last row of an attempt that was given more
        if "step" in row:
            if row["step"] < step or row.get("workers", workers) != workers:
                again = "went back to a checkpoint; " if row["step"] < step else ""
                log.warning("%sstep %s with %s of %s workers", again, row["step"], row["workers"], cluster.workers)
            step, workers = row["step"], row.get("workers", workers)
        progress(row)

    return told


def _tell_failure(storage: Storage) -> None:
    if storage.is_file(FAILURE):
        raise TrainingError(storage.read(FAILURE).decode()) from None


def _worker(settings: dict) -> None:
    """What each Ray Train worker runs. A mistake of the user is written down, so that it is told once and not
    retried."""
    import warnings

    warnings.filterwarnings("ignore")
    import ray.train

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logs.start_worker(settings["log"], rank=ray.train.get_context().get_world_rank(), host=socket.gethostname())
    signals.show_stacks()
    run: Run = settings["run"]
    run = run.with_workers(
        ray.train.get_context().get_world_size()
    )  # fewer where nodes were lost and cluster.min_workers allows it
    storage = Storage(run.folder)
    if storage.is_file(FAILURE):
        return  # the mistake of another worker, or of this one before Ray started it again: the driver tells it
    try:
        worker(run, ray.train.report)
    except (StorageError, ClusterError):
        raise  # may pass by itself: tried again
    except UnlearnError as e:
        storage.write(FAILURE, str(e).encode())
        raise


def resources(cluster: config.Cluster) -> dict[str, float]:
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return {kind: count for kind, count in wanted.items() if count}


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else type(error).__name__
