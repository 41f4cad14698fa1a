"""How much arithmetic a run is, and about how long it takes: FLOPs by the model's own formula, time by the device's peak."""

import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from unlearn import config, views
from unlearn.data import order
from unlearn.methods import base as methods
from unlearn.models import base, weights
from unlearn.planning import footprint
from unlearn.training.metrics import PEAK

# FLOP/s of one device in float32 without tensor cores, from the makers' data sheets; bfloat16: metrics.PEAK.
PEAK_FP32 = {"H100 80GB HBM3": 67e12, "H200": 67e12, "A100": 19.5e12, "L40S": 91.6e12, "B200": 80e12}
# GiB of one device, where it is not at hand to be asked.
MEMORY = {"H100 80GB HBM3": 80, "H200": 141, "A100-80G": 80, "A100": 40, "L40S": 48, "B200": 180}
# FLOPs that a feature network takes to look at one image.
FEATURES = {"efficientnet_lite0": 0.8e9, "inception": 11.4e9, "clip": 334e9}
# Seconds before the first step and after the last: imports, weights, Ray, export.
START = {"torch": 10, "deepspeed": 30}
# Options of models that fill in holes step by step: how many steps.
PASSES = ("sampling_steps", "decoding_steps")
# Sizes at which a range of views is looked at.
SAMPLES = 5


@dataclass(frozen=True)
class Work:
    """FLOPs: step, of one optimizer step of all workers; first_stage, of a step in the frozen first stage, in float32 as all that follows;
    images: of a step; once: of what comes before training (latents); evaluation: all of it, None where there is none or its
    images are not there; steps: None where epochs refer to data that is not there."""

    step: float
    first_stage: float
    images: int
    once: float
    evaluation: float | None
    steps: int | None


@dataclass(frozen=True)
class Cost:
    """Seconds that the work takes, and images/s: as expected, and at the floor, where the device's peak is reached."""

    step: float
    training: float | None
    once: float
    evaluation: float | None
    start: float
    images: float
    floor: float

    @property
    def total(self) -> float | None:
        return None if self.training is None else self.start + self.once + self.training + (self.evaluation or 0)


def work(run: config.RunConfig, sizes: dict[str, int] | None = None, steps: int | None = None, measured: int | None = None) -> Work:
    """sizes: images of each set; steps: of the run; measured: images that the evaluation sees; None where the data is not there."""
    options, method = weights.options(run.model), methods.create(run.method)
    with footprint.fake():
        model = base.adapter(run.model.family)(options)
        first_stage, view = model.first_stage, views.fullest(run.train_views, model.grid, 1, order.generator(0))
        image = torch.zeros(1, 3, options.image_size, options.image_size)
        into = base.count_flops(lambda: first_stage(image, view)) if first_stage is not None and not method.trains_first_stage else 0
        if method.trains_first_stage:
            each = 3 * base.count_flops(lambda: model.first_stage_loss(image))
        else:
            with torch.no_grad():
                inputs = model.inputs(image, view)
            whole = base.count_flops(lambda: model.training_loss(inputs, view))
            each = 3 * whole
    if not method.needs_decoder:
        each = method.units * float(np.mean([_forward(model, spec) for spec in run.train_views]))
    evaluation = None
    if method.needs_teacher and measured:
        filled = into + whole * next((getattr(options, name) for name in PASSES if hasattr(options, name)), 1)
        looked = FEATURES[run.evaluation.features.partition(":")[0]]
        pictures = len(run.evaluation.views) * (3 if run.evaluation.oracle else 2)
        evaluation = measured * (looked + pictures * (filled + looked))
    cached = run.data.latent_cache is not None and first_stage is not None
    images = run.training.batch_size
    return Work(
        step=images * each, first_stage=0 if cached else images * into, images=images,
        once=into * run.data.latent_views * sum((sizes or {}).values()) if cached else 0, evaluation=evaluation, steps=steps,
    )  # fmt: skip


def cost(run: config.RunConfig, work: Work, peak: float, plain: float, share: float) -> Cost:
    """peak: FLOP/s of one worker's device, plain: in float32; share: of it that is reached (MFU, which does not count what
    checkpointing repeats)."""
    rate, slow = (each * share * run.cluster.workers for each in (peak, plain))
    units = methods.method_class(run.method.name).units
    again = (units + 1) / units if run.training.activation_checkpointing and units else 1
    step = work.step / rate * again + work.first_stage / slow
    return Cost(
        step=step, training=None if work.steps is None else work.steps * step, once=work.once / slow,
        evaluation=None if work.evaluation is None else work.evaluation / slow, start=START[run.training.engine],
        images=work.images / step, floor=work.images / (share * (work.step / rate + work.first_stage / slow)),
    )  # fmt: skip


def known(name: str) -> str | None:
    """The GPU of the tables that this name means: the maker's, Ray's, or the key itself."""
    name = {"H100": "H100 80GB HBM3"}.get(name.upper(), name)
    exact = (key for key in MEMORY if key.lower() == name.lower())
    return next(exact, None) or next((key for key in MEMORY if key in name), None)


def gpu_peak(key: str, dtype: str) -> float:
    """FLOP/s of a GPU of the tables."""
    return next(peak for name, peak in (PEAK if dtype == "bf16" else PEAK_FP32).items() if name in key)


def gpu_measured(dtype: str) -> float:
    """FLOP/s of the GPU of this machine, where it is in no table: of a product of two matrices."""
    return _product(8192, torch.device("cuda"), torch.bfloat16 if dtype == "bf16" else torch.float32, 0.5)


def cpu_peak(threads: int, workers: int, seconds: float = 0.3) -> float:
    """FLOP/s of one worker on this machine, from a product of two matrices; workers share its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    try:
        best = _product(512, torch.device("cpu"), torch.float32, seconds)
        return best * min(1, (os.cpu_count() or 1) / (threads * workers))
    finally:
        torch.set_num_threads(before)


def _product(side: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The best FLOP/s of multiplying two square matrices again and again."""
    a, b, best = torch.rand(side, side, device=device, dtype=dtype), torch.rand(side, side, device=device, dtype=dtype), 0.0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _forward(model: base.Adapter, spec: config.ViewSpec) -> float:
    """FLOPs of the encoder for one image, the mean over the sizes that this kind of view draws."""
    low, high = spec.size if isinstance(spec.size, tuple) else (spec.size, spec.size)
    sizes = np.linspace(low, high, SAMPLES if low < high else 1)
    drawn = [views.draw([config.ViewSpec(kind=spec.kind, size=float(size))], model.grid, 1, order.generator(0)) for size in sizes]
    return float(np.mean([model.flops(view) for view in drawn]))
