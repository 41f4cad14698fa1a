"""The worker's loop: what one process of a run does from its first step to its last."""

import contextlib
import itertools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from unlearn import config, patience, views
from unlearn.data import order, s3_client
from unlearn.data.loader import Loader
from unlearn.methods import base as methods
from unlearn.models import weights
from unlearn.models.base import Adapter
from unlearn.run import Run
from unlearn.training import heartbeat, latents, saliency
from unlearn.training.average import Average
from unlearn.training.checkpoint import Checkpoints, TrainerState
from unlearn.training.engine import DeepSpeedEngine, Engine, Objective, TorchEngine
from unlearn.training.failures import LESS_TO_KEEP, room, told
from unlearn.training.heartbeat import Heartbeat
from unlearn.training.kept import Kept
from unlearn.training.metrics import MetricsLog
from unlearn.training.phases import Phases
from unlearn.training.window import Window

logger = logging.getLogger(__name__)

# Called with every logged row, on every rank.
Report = Callable[[dict], None]


def worker(
    run: Run, report: Report = lambda row: None, until: int | None = None, kept: Kept | None = None
) -> None:  # fmt: skip
    """Train this process's share of a run, going on from its newest checkpoint where there is one.

    until: the step behind which it stops with a checkpoint, before its end; kept: what this process has kept of former
    runs. Inside a Ray Train worker the process group exists already; with `engine: torch` none is needed. Raises
    ClusterError, which names a rank that is missing, where a collective fails.
    """
    patience.use(run.settings.storage.patience)
    with heartbeat.beating(run.settings.cluster.timeout) as heart:
        _work(run, report, heart, min(until or run.steps, run.steps), kept or Kept())


def _work(run: Run, report: Report, heart: Heartbeat, until: int, kept: Kept) -> None:
    settings = run.settings
    torch.set_num_threads(settings.training.threads)
    device = _device(settings.cluster)
    checkpoints = Checkpoints(run.folder, settings.training.keep_checkpoints)
    start = checkpoints.newest()

    method = methods.create(settings.method)
    student = weights.build(settings.model, settings.seed, run.sources)
    with room("the first stage", LESS_TO_KEEP):
        first_stage = None if method.trains_first_stage else student.take_first_stage(device)
        if first_stage is not None:
            student.stock_noise(first_stage, settings.seed)
    kept.begin(run, device)
    caches = None
    if first_stage is not None and settings.data.latent_cache:
        caches = latents.filled(run, student, first_stage, device, report)
        first_stage = None  # the latent cache replaces it, so it leaves the device
    loader = Loader(settings, run.sets, student.grid, student.options.image_size, caches, kept.images(settings))
    if start:
        checkpoints.state(start).check(run, checkpoints.storage.where(f"checkpoints/step-{start:08d}"))
    phases = Phases(method, run.steps, student)
    method.at(start + 1, run.steps)
    with checkpoints.open(start) if start else contextlib.nullcontext() as saved:
        if saved:
            saved.weights(student)
        with room("the model, with its teacher,", LESS_TO_KEEP):
            engine = make_engine(settings, method, student, first_stage, device, run.sources, kept)
        heart.limit_groups()
        if method.sample_size():
            method.prepare(_sample(engine, loader, method.sample_size()))
        remembered = saved.method if saved else {name: t.clone() for name, t in method.state_dict().items()}
        with told(settings, engine):
            _dry_run_step(engine, loader, settings)
        method.load_state_dict(remembered)
        masks = _masks(settings, engine, loader, remembered if saved else None)
        if saved:
            saved.restore(engine.fragments(), start - phases.span(start + 1)[0])
        decay = settings.training.ema
        average = None if decay is None else Average(engine.fragments(), decay)
        if saved and average:
            saved.restore_average(average.fragments)
    metrics = MetricsLog(run.folder, start) if engine.rank == 0 else contextlib.nullcontext()
    with told(settings, engine), metrics as log:
        train(
            run, engine, loader, checkpoints, start, until, student, method, phases, report, log, heart, average, masks
        )


def _device(cluster: config.Cluster) -> torch.device:
    """What this process computes on. Of a GPU that it shares it takes its part of the memory, and leaves the others
    theirs."""
    if not cluster.gpus_per_worker:
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_per_process_memory_fraction(min(1.0, cluster.gpus_per_worker), device)
    # Its backward pass gives NaN for some shapes on Hopper (pytorch issue 196678); the other kernels do not.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def train(
    run: Run, engine: Engine, loader: Loader, checkpoints: Checkpoints, start: int, until: int, student: Adapter,
    method: methods.Method, phases: Phases, report: Report, log: MetricsLog | None, heart: Heartbeat,
    average: Average | None = None, masks: saliency.Masks | None = None,
) -> None:  # fmt: skip
    """Steps start .. until: fetch, compute, update, log, save. log: of rank 0."""
    settings, stop = run.settings, run.steps
    batches = _weighted(
        settings, engine, loader.batches(_numbers(settings, engine, start, until), pin=engine.device.type == "cuda")
    )
    window = Window(settings, engine, student, method)
    if log:
        logger.info(
            "%s at step %s of %s",
            f"resumed from the checkpoint of step {start}," if start else "starts",
            start + 1,
            stop,
        )
    for step in range(start + 1, until + 1):
        heart.at(f"step {step}")
        method.at(step, stop)
        before, end = phases.span(step)
        rate = learning_rate(settings.training.at(step), step - 1 - before, end - before)
        mine = window.watch(itertools.islice(batches, settings.accumulation))
        window.add(engine.step(mine, rate))
        if average:
            average.update()
        if step % settings.training.log_every == 0 or step == until:
            row = {"step": step, "steps": stop, **window.row(), "lr": rate}
            row |= {"bad_images": _bad_images(engine, loader, log), "workers": engine.workers}
            if log:
                log.add(row)
            report(row)
        if step in phases.restarts:
            with window.paused():
                _restart(phases, engine, loader, settings, method)
            if average and settings.training.ema is not None:
                average = Average(engine.fragments(), settings.training.ema)
        if step % settings.training.checkpoint_every == 0 or step == until:
            samples = step * settings.training.batch_size
            state = TrainerState(step, samples, settings.hash(step), run.origin, engine.workers)
            heart.at(f"the checkpoint of step {step}")
            with window.paused():
                if log:
                    log.flush()  # first, so that a committed checkpoint has all its rows
                pieces = average.fragments if average else ()
                checkpoints.save(engine.fragments(), state, engine.rank, engine.gather, state_of(method, masks), pieces)
            if log:
                logger.info("checkpoint of step %s committed", step)
    sent = sum(engine.gather(s3_client.requests.total()))
    if log and sent:
        logger.info("%d requests to S3 by %d worker(s)", sent, engine.workers)


def state_of(method: methods.Method, masks: saliency.Masks | None) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps beside weights and optimizer."""
    return method.state_dict() | saliency.packed(masks or {})


def learning_rate(settings: config.Training, step: int, stop: int) -> float:
    """Linear warm-up, then cosine to zero or constant; `step` counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, stop - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_engine(
    settings: config.RunConfig,
    method: methods.Method,
    student,
    first_stage,
    device: torch.device,
    sources: weights.Sources | None = None,
    kept: Kept | None = None,
) -> Engine:
    """The engine with student, teacher and first stage in it. sources: of the teacher's weights, where looked up
    already."""
    if not method.needs_decoder:
        student.drop_decoder()
    student.encoder.activation_checkpointing = settings.training.activation_checkpointing
    teacher = None
    if method.needs_teacher:
        teacher = (kept or Kept()).teacher(settings, device, method.needs_decoder, sources)
    objective, trained = Objective(student, method, teacher, first_stage), method.trainable(student)
    if settings.training.engine == "torch":
        return TorchEngine(objective, trained, settings.training, device)
    return DeepSpeedEngine(objective, trained, settings.training, device, settings.accumulation, settings.micro_batch)


def _numbers(settings: config.RunConfig, engine: Engine, start: int, stop: int):
    """Where a global batch does not divide evenly among the workers, some compute one extra micro-batch, since all must
    take part in every collective; its weight is zero."""
    per_step = settings.training.batch_size // settings.micro_batch
    for step in range(start, stop):
        mine = order.micro_batches(step, engine.rank, engine.workers, per_step)
        yield from mine
        yield from [step * per_step] * (settings.accumulation - len(mine))


def _weighted(settings: config.RunConfig, engine: Engine, batches):
    """The engine takes the mean over all micro-batches of all workers; with these weights it is the mean over the true
    ones."""
    per_step = settings.training.batch_size // settings.micro_batch
    mine = len(order.micro_batches(0, engine.rank, engine.workers, per_step))
    scale = settings.accumulation * engine.workers / per_step
    for i, batch in enumerate(batches):
        yield replace(batch, weight=scale if i % settings.accumulation < mine else 0.0)


def _sample(engine: Engine, loader: Loader, count: int) -> torch.Tensor:
    """Inputs of about `count` training images, the same on every rank."""
    numbers = range(max(1, count // (loader.retain + loader.forget)))
    return torch.cat([engine.objective.on(loader.batch(n), engine.device, torch.float32).images for n in numbers])


def _masks(
    settings: config.RunConfig, engine: Engine, loader: Loader, saved: dict[str, torch.Tensor] | None
) -> saliency.Masks | None:
    """The saliency mask where one is wanted, in force: saved, or measured on the first global batches."""
    share = getattr(settings.method, "saliency", None)
    if share is None:
        return None
    if saved is not None:
        masks = saliency.unpacked(engine, saved)
    else:
        batches = _weighted(settings, engine, loader.batches(_numbers(settings, engine, 0, saliency.BATCHES)))
        with told(settings, engine):
            masks = saliency.measured(engine, saliency.steps(batches, settings.accumulation), share)
    saliency.apply(engine, masks)
    return masks


def _restart(
    phases: Phases, engine: Engine, loader: Loader, settings: config.RunConfig, method: methods.Method
) -> None:
    """Weights and optimizer as the run began; the method keeps what it remembers."""
    remembered = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    phases.rewind(engine)
    _dry_run_step(engine, loader, settings)
    method.load_state_dict(remembered)


def _bad_images(engine: Engine, loader: Loader, log: MetricsLog | None) -> int:
    """Damaged images that any worker has met; their ids go to bad_images.json in the run folder."""
    met: dict[str, set[str]] = {}
    for bad_ids in engine.gather(loader.bad_images):
        for name, ids in bad_ids.items():
            met.setdefault(name, set()).update(ids)
    if met and log:
        log.attach("bad_images.json", json.dumps({name: sorted(ids) for name, ids in met.items()}).encode())
    return sum(map(len, met.values()))


def _dry_run_step(engine: Engine, loader: Loader, settings: config.RunConfig) -> None:
    """One whole step at learning rate 0 before the first: shapes, memory and communication fail here, not later.

    It sees the largest micro-batch that can come. The weights stay bit-identical, and the optimizer state is reset.
    """
    view = views.fullest(
        settings.train_views, loader.grid, loader.retain + loader.forget, order.generator(settings.seed, 1 << 23)
    )
    batch = replace(loader.batch(0), view=view, seed=0)  # of no micro-batch that will come: its targets are not kept
    engine.step(itertools.repeat(batch, settings.accumulation), 0.0)
    for fragment in engine.fragments():
        fragment.reset()
