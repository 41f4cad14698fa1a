"""The worker's loop: what one process of a run does from its first step to its last."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from unlearn import config, views
from unlearn.data import order, selection
from unlearn.data.codes import Codes
from unlearn.data.loader import Loader
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage
from unlearn.errors import TrainingError
from unlearn.methods import base as methods
from unlearn.models import weights
from unlearn.training import metrics
from unlearn.training import teacher as teachers
from unlearn.training.checkpoint import Checkpoints, TrainerState
from unlearn.training.engine import DeepSpeedEngine, Engine, Objective, TorchEngine
from unlearn.training.metrics import MetricsLog, mfu, peak_memory

# Called with every logged row, on every rank.
Report = Callable[[dict], None]


def worker(run: config.RunConfig, report: Report = lambda row: None) -> None:
    """Train this process's share of a run, going on from its newest checkpoint where there is one.

    Inside a Ray Train worker the process group exists already; with `engine: torch` none is needed.
    """
    torch.set_num_threads(run.training.threads)
    device = torch.device("cuda", torch.cuda.current_device()) if run.cluster.gpus_per_worker else torch.device("cpu")
    found = sets(run)
    checkpoints = Checkpoints(run.run_dir, run.training.keep_checkpoints)
    start = (checkpoints.steps() or [0])[-1]

    method = methods.create(run.method)
    student = weights.build(run.model, run.seed)
    front = None if method.trains_front else student.take_front(device)
    if front is not None:
        student.stock_noise(front, run.seed)
    kept = codes(run, found, student, front, device, report) if front is not None and run.data.codes else None
    if kept:
        front = None  # the codes stand for it, so it leaves the device
    loader = Loader(run, found, student.grid, student.options.image_size, kept)
    data = origin(run, found)
    if start:
        checkpoints.state(start).check(run.hash(), data, checkpoints.storage.where(f"checkpoints/step-{start:08d}"))
    with checkpoints.open(start) if start else contextlib.nullcontext() as saved:
        if saved:
            saved.weights(student)
        engine = _engine(run, method, student, front, device)
        if method.sample_size():
            method.prepare(_sample(engine, loader, method.sample_size()))
        with _told(run, engine):
            _rehearse(engine, loader, run)
        if saved:
            saved.restore(engine.fragments(), start)
    with _told(run, engine):
        train(run, engine, loader, checkpoints, data, start, steps(run, found), student, method, report)


def train(
    run: config.RunConfig, engine: Engine, loader: Loader, checkpoints: Checkpoints, data: dict, start: int, stop: int,
    student, method: methods.Method, report: Report,
) -> None:  # fmt: skip
    """Steps start .. stop: fetch, compute, update, log, save."""
    log = MetricsLog(run.run_dir, start) if engine.rank == 0 else None
    batches = _weighted(run, engine, loader.batches(_numbers(run, engine, start, stop), pin=engine.device.type == "cuda"))
    window = _Window(run, engine, student, method)
    for step in range(start + 1, stop + 1):
        mine = window.watch(itertools.islice(batches, run.accumulation))
        window.add(engine.step(mine, learning_rate(run.training, step - 1, stop)))
        if step % run.training.log_every == 0 or step == stop:
            row = {"step": step, "steps": stop, **window.row(), "lr": learning_rate(run.training, step - 1, stop)}
            row |= {"bad_images": _bad_images(run, engine, loader), "workers": engine.workers}
            if log:
                log.add(row)
            report(row)
        if step % run.training.checkpoint_every == 0 or step == stop:
            state = TrainerState(step, step * run.training.batch_size, run.hash(), data, engine.workers)
            with window.paused():
                if log:
                    log.flush()  # first, so that a committed checkpoint has all its rows
                checkpoints.save(engine.fragments(), state, engine.rank, engine.gather)
    if log:
        log.close()


def sets(run: config.RunConfig) -> dict[str, RowSet]:
    """The sets that the method sees: one that needs no forget set trains without those rows."""
    found = selection.sets(run.data, run.seed)
    if not methods.method_class(run.method.name).needs_forget:
        found.pop("forget", None)
    return found


def origin(run: config.RunConfig, found: dict[str, RowSet]) -> dict[str, str]:
    """Hashes of what a run starts from: the manifest of each set, and the weights."""
    data = {name: rows.manifest.hash for name, rows in found.items()}
    files = {"weights": run.model.weights, "front": run.model.front}
    return data | {name: weights.fingerprint(uri) for name, uri in files.items() if uri}


def steps(run: config.RunConfig, found: dict[str, RowSet]) -> int:
    """Optimizer steps of the run; an epoch is a pass over the set that takes longest."""
    if run.training.steps:
        return run.training.steps
    retain, forget = order.split(run.micro_batch, run.training.forget_fraction if "forget" in found else 0)
    per_step = run.training.batch_size // run.micro_batch
    passes = [len(found["retain"]) / (retain * per_step)]
    passes += [len(found["forget"]) / (forget * per_step)] if forget else []
    return max(1, math.ceil(run.training.epochs * max(passes)))


def learning_rate(settings: config.Training, step: int, stop: int) -> float:
    """Linear warm-up, then cosine to zero or constant; `step` counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, stop - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def codes(run: config.RunConfig, found: dict[str, RowSet], student, front, device: torch.device, report: Report) -> dict[str, Codes]:
    """What the front makes of every image of the sets, made where it is missing; the workers share the work."""
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    made = {name: Codes(run, rows, student, front) for name, rows in found.items()}

    def told(done: int, of: int) -> None:
        row = {"coding": done, "of": of}
        Storage(run.run_dir).write(metrics.CODING, json.dumps(row).encode())
        if not together:  # Ray's report waits for all workers, who do not make as many codes
            report(row)

    for each in made.values():
        each.fill(device, rank, workers, told if rank == 0 else lambda done, of: None)
    if together:
        dist.barrier()
    for each in made.values():
        each.forget_front()
    return made


def _engine(run: config.RunConfig, method: methods.Method, student, front, device: torch.device) -> Engine:
    """The engine with student, teacher and front in it."""
    if not method.needs_decoder:
        student.drop_decoder()
    student.encoder.activation_checkpointing = run.training.activation_checkpointing
    teacher = teachers.load(run, device, method.needs_decoder) if method.needs_teacher else None
    objective, trained = Objective(student, method, teacher, front), method.trainable(student)
    if run.training.engine == "torch":
        return TorchEngine(objective, trained, run.training, device)
    return DeepSpeedEngine(objective, trained, run.training, device, run.accumulation, run.micro_batch)


def _numbers(run: config.RunConfig, engine: Engine, start: int, stop: int):
    """Where the workers cannot share a global batch evenly some compute one micro-batch too many, since all must take part in
    every exchange; it counts for nothing."""
    per_step = run.training.batch_size // run.micro_batch
    for step in range(start, stop):
        mine = order.micro_batches(step, engine.rank, engine.workers, per_step)
        yield from mine
        yield from [step * per_step] * (run.accumulation - len(mine))


def _weighted(run: config.RunConfig, engine: Engine, batches):
    """The engine takes the mean over all micro-batches of all workers; with these weights it is the mean over the true ones."""
    per_step = run.training.batch_size // run.micro_batch
    mine = len(order.micro_batches(0, engine.rank, engine.workers, per_step))
    scale = run.accumulation * engine.workers / per_step
    for i, batch in enumerate(batches):
        yield replace(batch, weight=scale if i % run.accumulation < mine else 0.0)


def _sample(engine: Engine, loader: Loader, count: int) -> torch.Tensor:
    """Inputs of about `count` training images, the same on every rank."""
    numbers = range(max(1, count // (loader.retain + loader.forget)))
    return torch.cat([engine.objective.on(loader.batch(n), engine.device, torch.float32).images for n in numbers])


def _bad_images(run: config.RunConfig, engine: Engine, loader: Loader) -> int:
    """Damaged images that all workers have met; their ids go to bad_images.json in the run folder."""
    met: dict[str, set[str]] = {}
    for found in engine.gather(loader.bad_images):
        for name, ids in found.items():
            met.setdefault(name, set()).update(ids)
    if met and engine.rank == 0:
        Storage(run.run_dir).write("bad_images.json", json.dumps({name: sorted(ids) for name, ids in met.items()}).encode())
    return sum(map(len, met.values()))


def _rehearse(engine: Engine, loader: Loader, run: config.RunConfig) -> None:
    """One whole step at learning rate 0 before the first: shapes, memory and communication fail here, not later.

    It sees the largest micro-batch that can come. The weights stay what they are to the bit, and the optimizer forgets it.
    """
    view = views.fullest(run.train_views, loader.grid, loader.retain + loader.forget, order.generator(run.seed, 1 << 23))
    engine.step(itertools.repeat(replace(loader.batch(0), view=view), run.accumulation), 0.0)
    for fragment in engine.fragments():
        fragment.reset()


@contextlib.contextmanager
def _told(run: config.RunConfig, engine: Engine):
    """Tell what fails on the device in the user's words."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise TrainingError(
            f"a micro-batch of {run.micro_batch} rows does not fit on the device ({str(e).splitlines()[0][:120]}): lower "
            "training.micro_batch_size, or set activation_checkpointing, a higher zero_stage or offload_optimizer"
        ) from None
    except RuntimeError as e:
        if "is not finite" in str(e):
            what = str(e).splitlines()[0]
        elif "device-side assert" in str(e) and engine.finite.culprit():
            what = f"the {engine.finite.culprit()} is not finite"
        else:
            raise
        raise TrainingError(
            f"{what}; stopped before the update, and the checkpoints before it are kept. The same settings lead here again: start "
            "a new run_dir with a lower training.lr or method.alpha, or look at the data"
        ) from None


class _Window:
    """Sums between two log rows, on the device; reading them is the only wait."""

    def __init__(self, run: config.RunConfig, engine: Engine, student, method: methods.Method):
        self.run, self.engine, self.student, self.method = run, engine, student, method
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.count, self.flops, self.began = 0, 0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Stop the clock: writing a checkpoint is not counted as training."""
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped

    def watch(self, batches):
        """The batches, their FLOPs counted as they pass."""
        for batch in batches:
            self.flops += self.student.flops(batch.view) * len(batch.images) * self.method.units if batch.weight else 0
            yield batch

    def add(self, parts: dict[str, torch.Tensor]) -> None:
        self.count += 1
        for name, value in parts.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def row(self) -> dict:
        """Means over the window and over all ranks; images/s and FLOP/s of the whole run."""
        micro = self.count * self.run.accumulation
        scale = {name: self.count if name == "grad_norm" else micro for name in self.sums}
        means = self.engine.mean(torch.stack([self.sums[n].float() / scale[n] for n in self.sums])).tolist()
        seconds = time.perf_counter() - self.began
        row = dict(zip(self.sums, means, strict=True))
        for name, value in row.items():
            if not math.isfinite(value):
                raise RuntimeError(f"{name} is not finite")
        row["images_per_s"] = self.count * self.run.training.batch_size / seconds
        if not self.method.needs_decoder:  # whose FLOPs nobody has counted
            rate = self.flops / seconds
            row["flop_per_s"] = rate * self.engine.workers
            share = mfu(rate, self.engine.device) if self.run.training.dtype == "bf16" else None
            row |= {} if share is None else {"mfu": share}
        row["peak_memory_gib"] = peak_memory(self.engine.device)
        self.restart()
        return row
