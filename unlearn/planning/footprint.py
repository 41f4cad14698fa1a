"""What one micro-batch keeps in memory, measured without computing it.

The student's forward and backward run on fake tensors, which have shapes and no data, and every allocation is counted.
For a ViT-H that takes seconds, and hardly any memory.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unlearn import config, views
from unlearn.data import order
from unlearn.data.loader import Batch
from unlearn.methods import base as methods
from unlearn.models import base
from unlearn.planning.shape import model_options
from unlearn.registry import MODELS
from unlearn.training.engine import Objective, terms

# Parameters of at most so many elements are never sharded by ZeRO-3 (DeepSpeed's param_persistence_threshold).
PERSISTENT = 100_000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Group:
    """Elements of some parameters: of all, of those that ZeRO-3 keeps whole on each rank (small), of the largest."""

    count: int
    small: int
    largest: int


@dataclass(frozen=True)
class Footprint:
    """trained, frozen: the student's parameters that are trained, and its others. teacher: the teacher's parameters.
    buffers, first_stage: bytes. whole: bytes of the model as it is built, with decoder and first stage, in float32.
    apart: terms of the loss whose gradients the method wants apart, 0 for most methods.
    averaged: whether a moving average of what is trained is kept. masked: whether a saliency mask is.

    curve: (n, 4), a row for each operation of forward and backward: bytes of activations and other temporary tensors;
    bytes of the gradients computed so far; elements of the teacher's and of the student's parameters used so far.
    """

    trained: Group
    frozen: Group
    teacher: Group
    buffers: int
    first_stage: int
    whole: int
    apart: int
    curve: np.ndarray
    averaged: bool = False
    masked: bool = False


def measure(
    settings: config.RunConfig,
    micro_batch: int,
    precision: str,
    checkpointing: bool,
    options: base.ModelOptions | None = None,
) -> Footprint:
    """The footprint of `micro_batch` rows under the view that hides least.

    precision: "fp32"; "autocast", float32 weights and bfloat16 arithmetic; "bf16", bfloat16 weights. options: the
    model's shape, where it is known already.
    """
    options, method = options or model_options(settings.model)[0], methods.create(settings.method)
    with fake():
        student, teacher, first_stage, whole = models(settings, options, method)
        student.encoder.activation_checkpointing = checkpointing
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # DeepSpeed leaves the student's buffers in float32; of the teacher everything is cast.
        cast = [*student.parameters(), *(() if teacher is None else (*teacher.parameters(), *teacher.buffers()))]
        for t in cast:
            t.data = t.data.to(dtype) if t.is_floating_point() else t.data
        objective = Objective(student, method, teacher, None if settings.data.latent_cache else first_stage)
        trained = method.trainable(student)
        batch = first_batch(settings, method, student, first_stage, micro_batch)
        with _Allocations(student, teacher, trained) as allocations:
            batch = objective.on(batch, CPU, dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                loss = (parts := objective(batch))["loss"]
            loss.backward()
        trained_ids = {id(p) for p in trained}
        return Footprint(
            averaged=settings.training.ema is not None,
            masked=getattr(settings.method, "saliency", None) is not None,
            trained=_group(trained),
            frozen=_group([p for p in student.parameters() if id(p) not in trained_ids]),
            teacher=_group(teacher.parameters() if teacher is not None else []),
            buffers=_bytes(student.buffers()) + _bytes(teacher.buffers() if teacher is not None else []),
            first_stage=0
            if first_stage is None or settings.data.latent_cache
            else _bytes((*first_stage.parameters(), *first_stage.buffers())),
            whole=whole,
            apart=len(terms(parts)) if method.gradients_apart else 0,
            curve=np.array(allocations.curve, dtype=np.int64),
        )


@contextlib.contextmanager
def fake() -> Iterator[None]:
    """Tensors made in here have no data. The models' caches are empty at first, so that operations are counted alike
    whatever was computed before, and at the end, so that no tensor without data stays in them."""
    _forget_caches()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Seedless():
            yield
    finally:
        _forget_caches()


def _forget_caches() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("unlearn.models.") or any(where.startswith(f"{name}:") for where in MODELS.entries.values()):
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", int)()


def models(settings: config.RunConfig, options: base.ModelOptions, method: methods.Method):
    """(student, teacher or None, first stage or None) as on a worker's device, and the bytes of a whole model."""
    cls = base.adapter(settings.model.family)
    student, teacher = cls(options), cls(options).requires_grad_(False) if method.needs_teacher else None
    whole = _bytes((*student.parameters(), *student.buffers()))
    first_stage = None
    if student.first_stage is not None and not method.trains_first_stage:
        first_stage, student.first_stage = student.first_stage.requires_grad_(False).eval(), None
        student.stock_noise(first_stage, settings.seed)
    for model in (student, teacher):
        if model is not None and not method.needs_decoder:
            model.drop_decoder()
    if teacher is not None:
        teacher.first_stage = None
    return student.train(), teacher.eval() if teacher is not None else None, first_stage, whole


def first_batch(
    settings: config.RunConfig, method: methods.Method, student: base.Adapter, first_stage: nn.Module | None, rows: int
) -> Batch:
    """A micro-batch as the loader hands it out, under the view that hides least."""
    retain, _ = order.split(rows, settings.training.forget_fraction if method.needs_forget else 0)
    view = views.fullest(settings.train_views, student.grid, rows, order.generator(settings.seed, 1 << 23))
    size = student.options.image_size
    images = torch.zeros(rows, 3, size, size, dtype=torch.uint8)
    if first_stage is not None and settings.data.latent_cache:
        with torch.no_grad():
            images = first_stage(student.normalise(images), view)
        images = images.half() if images.is_floating_point() else images.to(torch.int16)
    if method.sample_size():
        method.prepare(
            student.normalise(images) if images.dtype == torch.uint8 and first_stage is None else images.float()
        )
    return Batch(images, view, retain, settings.seed)


class _Seedless(TorchFunctionMode):
    """Drops the generator from every call: not every operation on fake tensors takes one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "generator"})


class _Allocations(TorchDispatchMode):
    """Counts the bytes of every storage from its operation until it is freed, but those of parameters and buffers."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, trained: list[nn.Parameter]):
        super().__init__()
        self.now = self.gradients = 0
        self.used = [0, 0]  # elements of the teacher's and of the student's parameters
        self.curve: list[tuple[int, int, int, int]] = []
        self._known: dict[int, object] = {}
        self._unused: dict[int, tuple[int, int]] = {}
        for which, model in enumerate((teacher, student)):
            if model is not None:
                self._known |= {t.untyped_storage()._cdata: t for t in (*model.parameters(), *model.buffers())}
                self._unused |= {p.untyped_storage()._cdata: (which, p.numel()) for p in model.parameters()}
        for p in trained:
            p.register_post_accumulate_grad_hook(self._gradient)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor) and (parameter := self._unused.pop(t.untyped_storage()._cdata, None)):
                which, elements = parameter
                self.used[which] += elements
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._add(t)
        self._record()
        return out

    def _add(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self.now += size
            self._known[key] = weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]

    def _gradient(self, p: nn.Parameter) -> None:
        assert p.grad is not None, "called when it was computed"
        self.gradients += p.grad.untyped_storage().nbytes()
        self._record()

    def _record(self) -> None:
        self.curve.append((self.now - self.gradients, self.gradients, self.used[0], self.used[1]))


def _group(parameters: Iterable[nn.Parameter]) -> Group:
    sizes = [p.numel() for p in parameters]
    return Group(sum(sizes), sum(n for n in sizes if n <= PERSISTENT), max(sizes, default=0))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
