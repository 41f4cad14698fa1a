"""A step of the plain engine against a bare PyTorch loop of the same mathematics; on a GPU also the share of its peak.

    python -m jobs.benchmarks.step [CONFIG] [--set a.b=c] [--rounds 3] [--model mae/vit_large_patch16]

--model: a named shape, with random weights and images.
"""

import argparse
import contextlib
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from jobs.benchmarks import command
from unlearn import config, views
from unlearn.data import order
from unlearn.data.loader import Batch, Loader
from unlearn.errors import ConfigError
from unlearn.methods import base as methods
from unlearn.methods.encoder_l2 import EncoderL2Options
from unlearn.models import base, weights
from unlearn.planning import footprint, memory
from unlearn.run import resolve
from unlearn.training import loop, metrics

# Different micro-batches in memory, used in turn.
BATCHES = 4


def step(
    run: config.RunConfig, rounds: int, seconds: float = 2, warm_up: int = 3, compiled: bool = False,
    channels_last: bool = False,
    synthetic: bool = False,
) -> None:  # fmt: skip
    """Rounds of engine steps and of bare steps in turn, each about `seconds` long: images/s of both, their ratio, and
    MFU.

    compiled: torch.compile on both encoders. channels_last: of convolutions. synthetic: noise for images, else those of
    the run. With training.engine deepspeed it is that engine, alone in its process group, that is compared with the
    bare loop.
    """
    if not isinstance(run.method, EncoderL2Options) or run.method.noise != "standard":
        raise ConfigError("benchmark step: the bare loop knows method encoder_l2 with noise standard alone")
    if channels_last and run.training.engine == "deepspeed":
        raise ConfigError(
            "--channels-last: DeepSpeed keeps weights in flat buffers of its own; measure it with training.engine=torch"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    torch.set_num_threads(run.training.threads)
    with _group(run, cuda):
        student = weights.build(run.model, run.seed)
        first_stage = student.take_first_stage(device)
        if first_stage is not None:
            student.stock_noise(first_stage, run.seed)
        batches, has_first_stage = _batches(run, student, first_stage, device, synthetic), first_stage is not None
        first_stage = None  # as with a latent cache
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        bare = Bare(run, copy.deepcopy(student), device, compiled, channels_last)
        engine = loop.make_engine(run, methods.create(run.method), student, None, device)
        _prepare((engine.objective.student, engine.objective.teacher), compiled, channels_last)
        engines = {"engine": lambda number: engine.step(_take(batches, number, run.accumulation), run.training.lr),
                   "bare loop": lambda number: bare.step(_take(batches, number, run.accumulation))}  # fmt: skip
        first = {name: call(0)["loss"].item() for name, call in engines.items()}
        if abs(first["engine"] - first["bare loop"]) > 0.02 * abs(first["bare loop"]):
            raise RuntimeError(f"the two do not compute the same: {first}")
        times = _rounds(engines, rounds, seconds, warm_up, device)
        each = [student.flops(batch.view) * methods.method_class(run.method.name).units for batch in batches]
        _tell(run, times, sum(each) / len(each), device, has_first_stage)


def _rounds(
    calls: dict[str, Callable], rounds: int, seconds: float, warm_up: int, device: torch.device
) -> dict[str, list[tuple]]:
    """(seconds by the clock, seconds of the processor) of one step of each call, a pair a round; the order alternates
    from round to round. On a shared CPU the processor time is more reliable."""
    times = {name: [] for name in calls}
    took = max(_time(call, 0, max(1, warm_up), device)[0] for call in calls.values())
    steps = max(1, round(seconds / took))
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(_time(calls[name], number * steps, steps, device))
    return times


def _time(call: Callable, first: int, steps: int, device: torch.device) -> tuple[float, float]:
    """Of the steps numbered from `first` on, whose batches are the same for every call."""
    began = time.perf_counter(), time.process_time()
    for number in range(first, first + steps):
        call(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began[0]) / steps, (time.process_time() - began[1]) / steps


def _ratio(what: str, times: dict[str, list[tuple]], which: int) -> None:
    ratios = sorted(e[which] / b[which] for e, b in zip(times["engine"], times["bare loop"], strict=True))
    low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
    print(
        f"{what}, engine / bare loop: {statistics.median(ratios):.3f} (median of {len(ratios)} rounds, middle half "
        f"{low:.3f} to {high:.3f})"
    )


def _tell(
    run: config.RunConfig, times: dict[str, list[tuple]], flops: float, device: torch.device, has_first_stage: bool
) -> None:
    _ratio("step time", times, 0)
    if device.type == "cpu":
        _ratio("processor time", times, 1)
    for name, samples in times.items():
        rate = run.training.batch_size / statistics.median(wall for wall, _ in samples)
        print(f"{name:9}  {rate:.1f} images/s, {flops:.3g} FLOPs an image, {rate * flops:.3g} FLOP/s")
    rate = run.training.batch_size / statistics.median(wall for wall, _ in times["engine"])
    if device.type == "cuda":
        if (share := metrics.mfu(rate * flops, device)) is not None:
            print(f"MFU {share:.1%} of the bf16 peak; at the floor {rate / share:.0f} images/s")
        strategy = memory.strategy(run)
        precision = memory.precision(run, strategy)
        if has_first_stage:  # the first stage is not on the device here, but its latents are
            run = run.model_copy(update={"data": run.data.model_copy(update={"latent_cache": "none"})})
        measured = footprint.measure(run, run.micro_batch, precision, strategy.checkpointing)
        needed, bare = (
            memory.estimate(measured, strategy, precision, 1, run.accumulation, True),
            16 * measured.trained.count + 4 * measured.teacher.count,
        )
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB, of which the bare loop keeps "
              f"{bare / 2**30:.2f}; plan says {needed.total / 2**30:.2f} without it")  # fmt: skip


class Bare:
    """The same step implemented with plain torch only."""

    def __init__(
        self, run: config.RunConfig, student: base.Adapter, device: torch.device, compiled: bool, channels_last: bool
    ):
        assert isinstance(run.method, EncoderL2Options), "checked by `step`"
        self.settings, self.method, self.device = run.training, run.method, device
        student.drop_decoder()
        self.student = student.to(device).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.student.encoder.activation_checkpointing = run.training.activation_checkpointing
        _prepare((self.student, self.teacher), compiled, channels_last)
        self.parameters = [p for p in self.student.encoder.parameters() if p.requires_grad]
        decayed = [p for p in self.parameters if max(p.shape, default=1) != p.numel()]
        others = [p for p in self.parameters if max(p.shape, default=1) == p.numel()]
        groups = [
            {"params": decayed, "weight_decay": run.training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=run.training.lr,
            betas=run.training.betas,
            fused=device.type == "cuda",
        )

    def step(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16"):
                loss = self.loss(batch)
            (loss / len(batches)).backward()
            total += loss.detach()
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": total}

    def loss(self, batch: Batch) -> torch.Tensor:
        images, view = batch.images.to(self.device, non_blocking=True), batch.view.to(self.device)
        if images.dtype == torch.uint8:
            images = self.student.normalise(images)
        with torch.no_grad():
            noise = self.student.noise_like(
                images[batch.retain :], torch.Generator(self.device).manual_seed(batch.seed)
            )
            if (self.method.noise_region or self.student.noise_region) == "hole":
                noise = self.student.fill_hole(images[batch.retain :], noise, view.rows(batch.retain, len(images)))
            target = self.teacher.encode(torch.cat([images[: batch.retain], noise]), view, batch.seed)
        predicted = self.student.encode(images, view, batch.seed)
        if isinstance(predicted, torch.Tensor):
            assert isinstance(target, torch.Tensor), "both are of one encoder"
            levels = [(predicted, target)]
        else:
            levels = list(zip(predicted, target, strict=True))
        loss = torch.zeros((), device=self.device)
        for x, y in levels:
            for rows, weight in ((slice(0, batch.retain), 1.0), (slice(batch.retain, None), self.method.alpha)):
                error = (x[rows].float() - y[rows].float()).square().mean()
                if self.method.distance == "relative":
                    error = error / y[rows].float().square().mean().clamp_min(1e-12)
                loss = loss + weight * error
        return loss


def _prepare(models: tuple, compiled: bool, channels_last: bool) -> None:
    for model in models:
        if channels_last:
            model.encoder.to(memory_format=torch.channels_last)
        if compiled:
            model.encoder.compile()


def _batches(
    run: config.RunConfig, student: base.Adapter, first_stage, device: torch.device, synthetic: bool
) -> list[Batch]:
    """Micro-batches in memory, pinned where the device is a GPU; where there is a first stage, latents are computed
    here."""
    size = student.options.image_size
    if synthetic:
        retain, forget = order.split(run.micro_batch, run.training.forget_fraction)
        batches, generator = [], torch.Generator().manual_seed(run.seed)
        for number in range(BATCHES):
            images = torch.randint(0, 256, (retain + forget, 3, size, size), generator=generator, dtype=torch.uint8)
            view = views.draw(run.train_views, student.grid, retain + forget, order.generator(run.seed, number))
            batches.append(Batch(images, view, retain, number))
    else:
        loader = Loader(run, resolve(run).sets, student.grid, size)
        batches = [loader.batch(number) for number in range(BATCHES)]
    if first_stage is not None:
        with torch.no_grad():
            cached = [first_stage(student.normalise(b.images.to(device)), b.view.to(device)).cpu() for b in batches]
        batches = [Batch(images, b.view, b.retain, b.seed) for images, b in zip(cached, batches, strict=True)]
    return [batch.pin() for batch in batches] if device.type == "cuda" else batches


def _take(batches: list[Batch], number: int, count: int) -> list[Batch]:
    return [batches[(number * count + i) % len(batches)] for i in range(count)]


@contextlib.contextmanager
def _group(run: config.RunConfig, cuda: bool) -> Iterator[None]:
    """A process group of this process alone, for DeepSpeed."""
    if run.training.engine == "torch":
        yield
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _one_worker(options: argparse.Namespace) -> list[str]:
    """Overrides for a step of one process: those of the command line come after them."""
    overrides = ["training.engine=torch", "cluster.workers=1"]
    if options.model:
        family, _, variant = options.model.partition("/")
        overrides += [
            f"model={{family: {family}, variant: {variant or 'null'}}}",
            "train_views=[{kind: random, size: 0.75}]",
        ]
    if torch.cuda.is_available():
        overrides += ["training.dtype=bf16", "cluster.gpus_per_worker=1"]
    rows = options.micro_batch
    return overrides + ([f"training.micro_batch_size={rows}", f"training.batch_size={rows}"] if rows else [])


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--model", metavar="FAMILY/VARIANT")
    parser.add_argument("--micro-batch", type=int, metavar="ROWS", help="of one step; default: the config's")
    parser.add_argument("--warm-up", type=int, default=3, metavar="STEPS")
    parser.add_argument("--seconds", type=float, default=2, help="of each round")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both encoders")
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    command.main("jobs.benchmarks.step", lambda: step(
        command.settings(options, _one_worker(options)), options.rounds, options.seconds, options.warm_up,
        options.compile,
        options.channels_last, options.model is not None,
    ))  # fmt: skip
