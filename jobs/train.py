"""Train: `python -m jobs.train CONFIG [--set a.b=c] [--resume]`, the driver behind `unlearn run` and `unlearn pretrain`."""

import sys
from collections.abc import Callable

from unlearn import config
from unlearn.data import selection
from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError, ClusterError, TrainingError, UnlearnError
from unlearn.methods import base as methods
from unlearn.models import base as models
from unlearn.training.checkpoint import Checkpoints

# Called with every logged row.
Progress = Callable[[dict], None]


def prepare(run: config.RunConfig, resume: bool = False) -> None:
    """Check everything that can be checked before anything expensive starts, and write the config to the run folder.

    Raises UnlearnError: no such data or class, an empty or overlapping set, weights that do not fit, a run folder that
    is in use or cannot be written.
    """
    from unlearn.models import weights

    cls = methods.method_class(run.method.name)
    methods.create(run.method).check(models.adapter(run.model.family))
    found = selection.sets(run.data, run.seed)
    selection.check_sizes(found, cls.needs_forget)
    model = weights.build(run.model, run.seed)
    if run.data.augment == "none" and run.model.weights is None and cls.needs_teacher:
        raise UnlearnError(f"model.weights is missing: {run.method.name} starts from a trained model")
    checkpoints = Checkpoints(run.run_dir, run.training.keep_checkpoints)
    steps = checkpoints.steps()
    if steps and not resume:
        raise CheckpointError(
            f"{run.run_dir} holds a run that has come to step {steps[-1]}: add --resume to go on, or give another run_dir"
        )
    if steps:
        manifests = {name: rows.manifest.hash for name, rows in found.items()}
        checkpoints.state(steps[-1]).check(run.hash(), manifests, run.run_dir)
    del model
    Storage(run.run_dir).write("config.yaml", config.dump(run).encode())


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
    from jobs.cluster import connected

    with connected(run.cluster, run.cluster.workers):
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        class Watch(ray.train.UserCallback):
            def after_report(self, run_context, metrics, checkpoint):
                progress(metrics[0])

        storage = Storage(run.run_dir)
        storage.delete("failure.txt")
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"run": run.model_dump(mode="json")},
            torch_config=TorchConfig(backend="nccl" if run.cluster.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=run.cluster.workers,
                use_gpu=run.cluster.gpus_per_worker > 0,
                resources_per_worker=_resources(run.cluster),
            ),
            run_config=ray.train.RunConfig(
                name="ray", storage_path=_scratch(run), callbacks=[Watch()],
                failure_config=ray.train.FailureConfig(max_failures=run.cluster.max_failures),
            ),
        )  # fmt: skip
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as e:
            told = storage.read("failure.txt").decode() if storage.is_file("failure.txt") else None
            if told:
                raise TrainingError(told) from None
            raise ClusterError(
                f"the workers failed more than cluster.max_failures ({run.cluster.max_failures}) times: {_last_line(e)}; "
                "the last checkpoint is good: add --resume to go on"
            ) from e


def _worker(settings: dict) -> None:
    """What each Ray Train worker runs. A mistake of the user is written down, so that it is told once and not retried."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    import ray.train

    from unlearn.training.loop import worker

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    run = config.parse(settings["run"])
    storage = Storage(run.run_dir)
    if storage.is_file("failure.txt"):
        raise TrainingError(storage.read("failure.txt").decode())
    try:
        worker(run, ray.train.report)
    except UnlearnError as e:
        storage.write("failure.txt", str(e).encode())
        raise


def _resources(cluster: config.Cluster) -> dict[str, float]:
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return {kind: count for kind, count in wanted.items() if count}


def _scratch(run: config.RunConfig) -> str:
    """Where Ray Train keeps its own records; the run's state is in our checkpoints, so they may be lost."""
    import tempfile

    return tempfile.mkdtemp(prefix="unlearn-ray-")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else type(error).__name__


if __name__ == "__main__":
    from unlearn.cli import main

    main(["run", *sys.argv[1:]])
