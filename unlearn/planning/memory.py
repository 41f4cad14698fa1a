"""Memory estimate of a run: bytes on each worker, for every strategy of distributing the work.

What is counted is what the engines keep: torch's own (float32 weights, whole), and DeepSpeed 0.19's ZeRO stages with
the settings of `training.zero.config` and its own defaults for the rest. N: elements of the trained parameters, W:
workers.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from unlearn import config
from unlearn.data import cache
from unlearn.data.selection import RowSet
from unlearn.methods import base as methods
from unlearn.planning import footprint
from unlearn.planning.footprint import Footprint
from unlearn.planning.shape import model_options
from unlearn.training.zero import BUCKET

# Elements that ZeRO-3 gathers ahead at once, and those it keeps gathered at most (DeepSpeed's defaults).
PREFETCH, LIVE = 50_000_000, 1_000_000_000


@dataclass(frozen=True)
class Strategy:
    """One strategy to run. stage None: plain torch."""

    stage: int | None
    offload: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        parts = ["plain torch" if self.stage is None else f"ZeRO {self.stage}"]
        parts += ["offload"] if self.offload else []
        return " + ".join(parts + (["checkpointing"] if self.checkpointing else []))


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes of one worker. device: by purpose; host: the offloaded part."""

    device: dict[str, int]
    host: int

    @property
    def total(self) -> int:
        return sum(self.device.values())


def strategy(run: config.RunConfig) -> Strategy:
    """The strategy that a config asks for."""
    t = run.training
    if t.engine == "torch":
        return Strategy(None, checkpointing=t.activation_checkpointing)
    return Strategy(t.zero_stage, t.offload_optimizer and t.zero_stage > 0, t.activation_checkpointing)


def precision(run: config.RunConfig, strategy: Strategy) -> str:
    """Number format of the arithmetic: see `footprint.measure`."""
    if run.training.dtype == "fp32":
        return "fp32"
    return "bf16" if strategy.stage else "autocast"


def estimate(
    measured: Footprint, strategy: Strategy, precision: str, workers: int, accumulation: int, cuda: bool
) -> MemoryEstimate:
    """Peak memory of one of `workers`; measured: the footprint at this precision, with or without checkpointing as
    the strategy says."""
    n, share = measured.trained.count, math.ceil(measured.trained.count / workers)
    size = 2 if precision == "bf16" else 4
    parts = {
        "parameters": size * (n + measured.frozen.count) + measured.buffers,
        "teacher": size * measured.teacher.count,
    }
    parts["optimizer"] = 12 * share if strategy.stage else 8 * n
    if measured.apart:  # from the first micro-batch to the update
        parts["terms"] = 4 * n * measured.apart
    if measured.masked:  # a byte for each weight, on every rank
        parts["mask"] = n
    average = 4 * measured.averaged * (share if strategy.stage else n)
    parts["optimizer"] += average
    if strategy.stage == 3:
        parts["parameters"] = (
            size * sum(_sharded(g, workers) for g in (measured.trained, measured.frozen)) + measured.buffers
        )
        parts["teacher"] = size * _sharded(measured.teacher, workers)
    host = 0
    if strategy.offload:
        host = (20 if strategy.stage == 3 else 16 + size + (4 if accumulation > 1 else 0)) * share
        host += average
        parts["optimizer"] = 0
    if measured.apart and strategy.stage is not None:
        moments = _moments_apart(measured, strategy, size, workers, cuda)
    else:
        moments = _moments(measured, strategy, size, workers, accumulation, cuda)
    worst = max(moments, key=lambda moment: sum(moment.values()))
    return MemoryEstimate({**parts, **worst, "first_stage": measured.first_stage}, host)


def caches(run: config.RunConfig, sets: dict[str, RowSet] | None, limit: int) -> int:
    """Host memory, in bytes, of the caches of one worker: what the data needs, at most `limit`.

    sets: None where the data cannot be read here; `limit` is assumed then."""
    if sets is None:
        return limit
    options, method = model_options(run.model)[0], methods.create(run.method)
    latent = 0
    if run.data.latent_cache:
        with footprint.fake():
            student, _, first_stage, _ = footprint.models(run, options, method)
            if first_stage is not None:
                latent = footprint.first_batch(run, method, student, first_stage, 1).images.nbytes
    if latent:
        return min(limit, latent * run.data.latent_views * sum(map(len, sets.values())))
    needed = cache.needed_bytes(sets, run.data, options.image_size, run.cluster.workers)
    # Where not all single images fit, row groups fill the rest.
    room = limit if run.data.cache == "none" else cache.ImageCache(limit).room
    return limit if needed is None or needed > room else needed


def _sharded(group: footprint.Group, workers: int) -> int:
    """Elements that a rank keeps of parameters sharded by ZeRO-3: its share, plus the small ones, which stay whole."""
    return math.ceil(group.count / workers) + group.small


def _moments(
    measured: Footprint, strategy: Strategy, size: int, workers: int, accumulation: int, cuda: bool
) -> list[dict[str, int]]:
    """Temporary memory at the two moments that may be the peak: within forward and backward, and in the update."""
    n, share = measured.trained.count, math.ceil(measured.trained.count / workers)
    activations, grads = measured.curve[:, 0], measured.curve[:, 1]
    backward = grads > 0
    bucket = np.zeros_like(grads)
    # torch's AdamW makes two temporary tensors as large as what it updates, unless it is fused.
    temporary = 0 if cuda and not strategy.offload else 8 * (share if strategy.stage else measured.trained.largest)
    if not strategy.stage:
        gradients = grads if accumulation == 1 else np.full_like(grads, size * n)
        copy = 4 * min(n, BUCKET) if strategy.stage == 0 and workers > 1 else 0
        update = {"gradients": 4 * n, "activations": 0, "buckets": max(copy, temporary)}
    elif strategy.stage == 1 and size == 2 and not strategy.offload:
        # DeepSpeed's BF16_Optimizer: float32 gradients of everything, always there, besides those of the micro-batches.
        gradients = 4 * n + (grads if accumulation == 1 else np.full_like(grads, 2 * n))
        update = {"gradients": 6 * n, "activations": 0, "buckets": temporary}
    elif strategy.stage == 1:
        gradients = grads * (4 // size) if accumulation == 1 else np.full_like(grads, 4 * n)
        bucket = np.where(backward, 4 * min(n, BUCKET), 0)
        update = {"gradients": 4 * n + 8 * share, "activations": 0, "buckets": temporary}
    else:
        gradients = np.full_like(grads, 4 * share if strategy.stage == 3 or accumulation > 1 else 0)
        bucket = np.where(backward | (strategy.stage == 3), size * min(n, BUCKET), 0)
        # Of float32 gradients the optimizer is given a copy.
        copies = 1 if strategy.stage == 2 and size == 2 else 2
        update = {
            "gradients": copies * 4 * share,
            "activations": 0,
            "buckets": temporary + (size * min(n, BUCKET) if strategy.stage == 3 else 0),
        }
        if strategy.stage == 3 and workers > 1:
            bucket = bucket + size * _gathered(measured, cuda)
    if strategy.offload:
        bucket = bucket + 2 * size * measured.trained.largest
        gradients, update["gradients"] = np.zeros_like(grads) if (strategy.stage or 0) > 1 else gradients, 0
    at = int(np.argmax(activations + gradients + bucket))
    within = {"gradients": int(gradients[at]), "activations": int(activations[at]), "buckets": int(bucket[at])}
    return [within, update]


def _moments_apart(
    measured: Footprint, strategy: Strategy, size: int, workers: int, cuda: bool
) -> list[dict[str, int]]:
    """The same where DeepSpeed is handed a float32 gradient that the method has put together of those of its terms: as
    these are computed, as it is handed over, which takes no activations, and in the update."""
    activations, grads = measured.curve[:, 0], measured.curve[:, 1]
    at = int(np.argmax(activations + grads))
    computing = {"gradients": int(grads[at]), "activations": int(activations[at]), "buckets": 0}
    handed_over, update = _moments(
        replace(measured, curve=measured.curve * np.array([0, 1, 1, 1])), strategy, size, workers, 1, cuda
    )
    handed_over["gradients"] += 4 * measured.trained.count
    return [computing, handed_over, update]


def _gathered(measured: Footprint, cuda: bool) -> np.ndarray:
    """Elements of sharded parameters that ZeRO-3 holds whole at each moment, with the buffers they are gathered in.

    Gathered parameters are copied out of the buffer, which stays until the last of them is used. Parameters used again
    within LIVE elements are kept, so the student's parameters stay from the forward to the backward, and the teacher's
    do not.
    """
    teacher, student = measured.teacher.count - measured.teacher.small, measured.trained.count + measured.frozen.count
    student -= measured.trained.small + measured.frozen.small
    used_t, used_s = (np.minimum(measured.curve[:, 2 + i], count) for i, count in enumerate((teacher, student)))
    # The student's first parameters are prefetched before the teacher's forward.
    ahead_t, ahead_s = min(teacher, PREFETCH), min(student, PREFETCH)
    copied_t = np.where(used_t > 0, np.minimum(teacher - used_t, LIVE), 0)
    whole = np.where(used_t < teacher, ahead_t + copied_t, 0) + np.where(used_s < student, ahead_s, 0)
    if not cuda:  # gloo receives into a buffer of its own
        whole = whole + np.where((used_t == 0) & (used_s == 0), ahead_t + ahead_s, 0)
    return whole + np.where(used_s > 0, min(student, LIVE), 0)
