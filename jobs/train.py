"""Train: `python -m jobs.train CONFIG [--set a.b=c] [--resume]`, the driver behind `unlearn run` and `unlearn pretrain`."""

import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future

from jobs.cluster import check_machine, connected
from unlearn import config
from unlearn.console import warn
from unlearn.data import selection
from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError, ClusterError, ConfigError, StorageError, TrainingError, UnlearnError
from unlearn.methods import base as methods
from unlearn.models import base as models
from unlearn.training.checkpoint import Checkpoints

# Called with logged rows: all of them on plain torch, the newest ones from Ray.
Progress = Callable[[dict], None]
# In the run folder: the user's mistake that stopped the workers.
FAILURE = "failure.txt"


def check(run: config.RunConfig) -> dict[str, dict]:
    """Check data, sets, method, weights and what the evaluation needs, and say what the sets hold; nothing is written.

    Raises UnlearnError: no such data or class, an empty or overlapping set, weights that do not fit.
    """
    from unlearn.evaluation import features, pictures
    from unlearn.models import weights
    from unlearn.training import loop

    cls = methods.method_class(run.method.name)
    methods.create(run.method).check(models.adapter(run.model.family))
    if run.model.weights is None and cls.needs_teacher:
        raise ConfigError(f"model.weights is missing: {run.method.name} starts from a trained model")
    if cls.needs_forget and not run.training.forget_fraction:
        raise ConfigError(f"training.forget_fraction is 0: {run.method.name} needs forget rows in every micro-batch")
    found = loop.sets(run)
    selection.check_sizes(found, cls.needs_forget)
    built = weights.build(run.model, run.seed)
    if run.data.codes and built.front is not None and run.data.augment != "none":
        raise ConfigError("data.augment: with data.codes every image is seen as it is; set augment to none, or leave out codes")
    if getattr(built.options, "norm_pix_loss", False):
        warn("these weights say pixels normalised by patch: they unlearn, but their pictures, and figures of these, mean little")
    if cls.needs_teacher:  # then there will be something to evaluate
        pictures.sets(run)
        features.check(run.evaluation.features, run.evaluation.features_weights)
        if run.evaluation.oracle:
            weights.build(run.model.model_copy(update={"weights": run.evaluation.oracle}))
    return selection.describe(found)


def prepare(run: config.RunConfig, resume: bool = False) -> None:
    """Check everything before anything expensive starts, and write the config to the run folder.

    Raises UnlearnError as `ready` does, and where the run folder cannot be written.
    """
    ready(run, resume)
    Storage(run.run_dir).write("config.yaml", config.dump(run).encode())


def ready(run: config.RunConfig, resume: bool = False) -> None:
    """Check everything that can be checked before the run; nothing is written.

    Raises UnlearnError as `check` does, where the run folder is in use, and where this machine has too little.
    """
    from unlearn.training import loop

    check(run)
    checkpoints = Checkpoints(run.run_dir, run.training.keep_checkpoints)
    steps = checkpoints.steps()
    if steps and not resume:
        raise CheckpointError(
            f"{run.run_dir} holds a run that has come to step {steps[-1]}: add --resume to go on, or give another run_dir"
        )
    if steps:
        checkpoints.state(steps[-1]).check(run.hash(), loop.origin(run, loop.sets(run)), run.run_dir)
    check_machine(run.cluster, run.cluster.min_workers or run.cluster.workers)


def train(run: config.RunConfig, resume: bool = False, progress: Progress = lambda row: None) -> str:
    """Train and export. Returns the URI of the model folder. The same call after a stop, with `resume`, goes on."""
    from unlearn.training.export import export

    prepare(run, resume)
    if run.training.engine == "torch":
        from unlearn.training.loop import worker

        worker(run, progress)
    else:
        _on_ray(run, progress)
    return export(run)


def _on_ray(run: config.RunConfig, progress: Progress) -> None:
    with connected(run.cluster, run.cluster.min_workers or run.cluster.workers), tempfile.TemporaryDirectory(prefix="unlearn-ray-") as scratch:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        from unlearn.training import metrics

        storage = Storage(run.run_dir)
        storage.delete(FAILURE)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"run": run.model_dump(mode="json")},
            torch_config=TorchConfig(backend="nccl" if run.cluster.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(run.cluster.min_workers, run.cluster.workers) if run.cluster.min_workers else run.cluster.workers,
                use_gpu=run.cluster.gpus_per_worker > 0,
                resources_per_worker=_resources(run.cluster),
            ),
            # Ray Train's own records go to a scratch folder: all that a run needs to go on is in its checkpoints.
            run_config=ray.train.RunConfig(
                name=run.name, storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=run.cluster.max_failures),
            ),
        )  # fmt: skip
        # In a thread, since in the main thread Ray Train takes Ctrl-C for itself and ends the process without a word.
        work = Future()
        threading.Thread(target=_into, args=(work, trainer.fit), daemon=True).start()
        metrics.follow(run.run_dir, work, _telling_of_losses(run, progress))
        try:
            work.result()
            _tell_failure(storage)
        except ray.train.TrainingFailedError as e:
            _tell_failure(storage)
            raise ClusterError(
                f"the workers failed more than cluster.max_failures ({run.cluster.max_failures}) times: {_last_line(e)}; "
                "the last checkpoint is good: add --resume to go on"
            ) from e


def _telling_of_losses(run: config.RunConfig, progress: Progress) -> Progress:
    """`progress` that also says when the run has gone back to a checkpoint, and with how many workers."""
    step, workers = 0, run.cluster.workers

    def told(row: dict) -> None:
        nonlocal step, workers
        if "step" in row:
            if row["step"] < step or row.get("workers", workers) != workers:
                again = "went back to a checkpoint; " if row["step"] < step else ""
                warn(f"{again}step {row['step']} with {row['workers']} of {run.cluster.workers} workers")
            step, workers = row["step"], row.get("workers", workers)
        progress(row)

    return told


def _tell_failure(storage: Storage) -> None:
    if storage.is_file(FAILURE):
        raise TrainingError(storage.read(FAILURE).decode()) from None


def _into(work: Future, call: Callable) -> None:
    try:
        work.set_result(call())
    except BaseException as e:
        work.set_exception(e)


def _worker(settings: dict) -> None:
    """What each Ray Train worker runs. A mistake of the user is written down, so that it is told once and not retried."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    import ray.train

    from unlearn.training.loop import worker

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    run = config.parse(settings["run"])
    workers = ray.train.get_context().get_world_size()  # fewer where nodes were lost and cluster.min_workers allows it
    run = run.model_copy(update={"cluster": run.cluster.model_copy(update={"workers": workers})})
    storage = Storage(run.run_dir)
    if storage.is_file(FAILURE):
        return  # the mistake of another worker, or of this one before Ray started it again: the driver tells it
    try:
        worker(run, ray.train.report)
    except StorageError:
        raise  # may pass by itself: tried again
    except UnlearnError as e:
        storage.write(FAILURE, str(e).encode())
        raise


def _resources(cluster: config.Cluster) -> dict[str, float]:
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return {kind: count for kind, count in wanted.items() if count}


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else type(error).__name__


if __name__ == "__main__":
    from unlearn.cli import main

    main(["run", *sys.argv[1:]])
