"""How much arithmetic a run is, by the model's own formula, and about how long it takes, by the device's peak."""

import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from unlearn import config, views
from unlearn.data import order
from unlearn.errors import ConfigError
from unlearn.methods import base as methods
from unlearn.models import base
from unlearn.planning import footprint
from unlearn.planning.shape import model_options
from unlearn.training.metrics import PEAK

# FLOP/s of one device in float32 without tensor cores, from the makers' data sheets; those in bfloat16 are in
# metrics.PEAK.
PEAK_FP32 = {"H100 80GB HBM3": 67e12, "H200": 67e12, "A100": 19.5e12, "L40S": 91.6e12, "B200": 80e12}
# GiB of one device, for planning where there is none.
GPU_MEMORY = {"H100 80GB HBM3": 80, "H200": 141, "A100-80G": 80, "A100": 40, "L40S": 48, "B200": 180}
# FLOPs of a feature network on one image.
FEATURE_FLOPS = {"efficientnet_lite0": 0.8e9, "inception": 11.4e9, "clip": 334e9}
# Seconds before the first step and after the last, by engine: imports, weights, Ray, export.
START_SECONDS = {"torch": 10, "deepspeed": 30}
# Options that say in how many steps a model fills in a hole.
STEP_OPTIONS = ("sampling_steps", "decoding_steps")
# How many sizes of a range of views are averaged over.
VIEW_SIZES = 5


@dataclass(frozen=True)
class Work:
    """The arithmetic of a run, in FLOPs of all workers together.

    step: of one optimizer step. The others are in float32:
    first_stage: of the frozen first stage in one step. once: of filling the latent cache.
    evaluation: of the whole evaluation; None where there is none or its images are not here.
    images: how many a step has. steps: of the run; None where epochs refer to data that is not here.
    """

    step: float
    first_stage: float
    images: int
    once: float
    evaluation: float | None
    steps: int | None


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of the work, and images/s: as expected, and `floor`, if the device's peak were reached."""

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


def work(
    settings: config.RunConfig,
    sizes: dict[str, int] | None = None,
    steps: int | None = None,
    measured: int | None = None,
    options: base.ModelOptions | None = None,
) -> Work:
    """sizes: images of each set; steps: of the run; measured: images that the evaluation sees; all None where the data
    is not here. options: the model's shape, where it is known already."""
    options, method = options or model_options(settings.model)[0], methods.create(settings.method)
    with footprint.fake():
        model = base.adapter(settings.model.family)(options)
        first_stage, view = model.first_stage, views.fullest(settings.train_views, model.grid, 1, order.generator(0))
        image = torch.zeros(1, 3, options.image_size, options.image_size)
        own_first_stage = first_stage is not None and not method.trains_first_stage
        to_inputs = base.count_flops(lambda: model.inputs(image, view)) if own_first_stage else 0
        forward = 0
        if method.trains_first_stage:
            each = 3 * base.count_flops(lambda: model.first_stage_loss(image))
        else:
            with torch.no_grad():
                inputs = model.inputs(image, view)
            forward = base.count_flops(lambda: model.training_loss(inputs, view))
            each = method.units * forward
    if not method.needs_decoder:
        each = method.units * float(np.mean([_encoder_flops(model, spec) for spec in settings.train_views]))
    evaluation = None
    if method.needs_forget and measured:
        evaluation = measured * _evaluation_flops(settings, options, to_inputs, forward)
    cached = settings.data.latent_cache is not None and first_stage is not None
    images = settings.training.batch_size
    return Work(
        step=images * each,
        first_stage=0 if cached else images * to_inputs,
        images=images,
        once=to_inputs * settings.data.latent_views * sum((sizes or {}).values()) if cached else 0,
        evaluation=evaluation,
        steps=steps,
    )


def _evaluation_flops(
    settings: config.RunConfig, options: base.ModelOptions, to_inputs: float, forward: float
) -> float:
    """FLOPs for one image: its features, and for each view and generator a reconstruction with its features."""
    kind = settings.evaluation.features.partition(":")[0]
    if kind not in FEATURE_FLOPS:
        raise ConfigError(
            f"evaluation.features: no network {settings.evaluation.features!r}; known: {', '.join(FEATURE_FLOPS)}"
        )
    steps = next((getattr(options, name) for name in STEP_OPTIONS if hasattr(options, name)), 1)
    reconstructions = len(settings.evaluation.views) * (2 + len(settings.evaluation.oracles))
    return FEATURE_FLOPS[kind] + reconstructions * (to_inputs + forward * steps + FEATURE_FLOPS[kind])


def cost(settings: config.RunConfig, work: Work, peak: float, plain: float, share: float) -> Cost:
    """peak: FLOP/s of one worker's device, plain: in float32; share: of the peak that is reached (MFU, which does not
    count what activation checkpointing computes again)."""
    rate, slow = (each * share * settings.cluster.workers for each in (peak, plain))
    units = methods.method_class(settings.method.name).units
    repeated = (units + 1) / units if settings.training.activation_checkpointing and units else 1
    step = work.step / rate * repeated + work.first_stage / slow
    return Cost(
        step=step,
        training=None if work.steps is None else work.steps * step,
        once=work.once / slow,
        evaluation=None if work.evaluation is None else work.evaluation / slow,
        start=START_SECONDS[settings.training.engine],
        images=work.images / step,
        floor=work.images / (share * (work.step / rate + work.first_stage / slow)),
    )


def known_gpu(name: str) -> str | None:
    """The key of GPU_MEMORY for a GPU's name: the maker's, Ray's, or the key itself. None for other GPUs."""
    name = {"H100": "H100 80GB HBM3"}.get(name.upper(), name)
    exact = (key for key in GPU_MEMORY if key.lower() == name.lower())
    return next(exact, None) or next((key for key in GPU_MEMORY if key in name), None)


def gpu_peak(key: str, dtype: str) -> float:
    """FLOP/s of a GPU of GPU_MEMORY."""
    return next(peak for name, peak in (PEAK if dtype == "bf16" else PEAK_FP32).items() if name in key)


def gpu_measured(dtype: str) -> float:
    """FLOP/s of this machine's GPU, measured on a product of two matrices: for GPUs that are not in GPU_MEMORY."""
    return _product(8192, torch.device("cuda"), torch.bfloat16 if dtype == "bf16" else torch.float32, 0.5)


def cpu_peak(threads: int, workers: int, seconds: float = 0.3) -> float:
    """FLOP/s of one worker on this machine's CPU, measured on a product of two matrices; workers share its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    try:
        best = _product(512, torch.device("cpu"), torch.float32, seconds)
        return best * min(1, (os.cpu_count() or 1) / (threads * workers))
    finally:
        torch.set_num_threads(before)


def _product(side: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The best FLOP/s of products of two square matrices, repeated for so many seconds."""
    a, b, best = (
        torch.rand(side, side, device=device, dtype=dtype),
        torch.rand(side, side, device=device, dtype=dtype),
        0.0,
    )
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _encoder_flops(model: base.Adapter, spec: config.ViewSpec) -> float:
    """FLOPs of the encoder for one image, the mean over the sizes that this kind of view draws."""
    low, high = spec.size if isinstance(spec.size, tuple) else (spec.size, spec.size)
    sizes = np.linspace(low, high, VIEW_SIZES if low < high else 1)
    drawn = [
        views.draw([config.ViewSpec(kind=spec.kind, size=float(size))], model.grid, 1, order.generator(0))
        for size in sizes
    ]
    return float(np.mean([model.flops(view) for view in drawn]))
