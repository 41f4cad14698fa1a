"""Engines that run a step: DeepSpeed (ZeRO 0-3), or plain torch in one process, with the same interface.

The plain engine is the reference: same batches, same loss, same optimizer, nothing else.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from unlearn.config import Training
from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods.base import Method
from unlearn.models.base import Adapter
from unlearn.training import fragments, zero
from unlearn.training.apart import Imposed, TermGradients
from unlearn.training.fragments import Fragment

Parts = dict[str, torch.Tensor]


def check(settings: Training, method: Method) -> None:
    """Raise ConfigError where the engine of a run cannot do what its method needs."""
    if method.gradients_apart and settings.engine == "deepspeed" and settings.zero_stage == 3:
        raise ConfigError(
            f"training.zero_stage 3: {method.name} needs the gradient of each term of its loss, and ZeRO-3 gives "
            "their sum alone; set zero_stage 2 or lower"
        )
    if getattr(method.options, "saliency", None) and settings.weight_decay:
        raise ConfigError(
            f"method.saliency: training.weight_decay {settings.weight_decay:g} would move the weights that are to "
            "stay; set it to 0"
        )


class Objective(nn.Module):
    """The student and its loss as one module, so that every use of a parameter is inside a forward that ZeRO hooks.

    Teacher and first stage are not submodules: their parameters are not trained here.
    """

    def __init__(self, student: Adapter, method: Method, teacher: Adapter | None, first_stage: nn.Module | None = None):
        super().__init__()
        self.student, self.method = student, method
        self._kept_out = (teacher, first_stage)

    @property
    def teacher(self) -> Adapter | None:
        return self._kept_out[0]

    @property
    def first_stage(self) -> nn.Module | None:
        return self._kept_out[1]

    def forward(self, batch: Batch | Imposed) -> Parts:
        """The loss and its terms, of which the loss alone has a gradient, or each, where the method wants them
        apart."""
        if isinstance(batch, Imposed):
            return {"loss": batch.loss()}
        terms = self.method.terms(batch, self.student, self.teacher)
        loss = self.method.loss(terms)
        parts = {"loss": loss} | {
            name: term if self.method.gradients_apart else term.detach() for name, term in terms.items()
        }
        return parts if batch.weight == 1 else {name: value * batch.weight for name, value in parts.items()}

    @torch.no_grad()
    def on(self, batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
        """A batch of the loader on the device, its pixels turned into inputs; what a loader of latents hands out is
        inputs."""
        images, view = batch.images.to(device, non_blocking=True), batch.view.to(device)
        if images.dtype == torch.uint8:
            images = self.student.normalise(images)
            images = images if self.first_stage is None else self.first_stage(images, view)
        return replace(batch, images=images.to(dtype) if images.is_floating_point() else images.long(), view=view)


class Engine(Protocol):
    """rank, workers: of the run. named: what is trained. fragments: this rank's part of the state."""

    rank: int
    workers: int
    device: torch.device
    objective: Objective
    finite: "FiniteCheck"
    named: list[tuple[str, nn.Parameter]]

    def step(self, batches: Iterable[Batch], lr: float) -> Parts:
        """One optimizer step over this rank's micro-batches. Sums of the loss parts over them, and `grad_norm`, all on
        the device. Raises RuntimeError before the update where a part is not finite."""
        ...

    def fragments(self) -> list[Fragment]: ...

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks."""
        ...

    def gather(self, value: object) -> list:
        """One object of every rank, in every rank."""
        ...


class FiniteCheck:
    """Stops before an update that is not finite, without waiting for the device: there the assertion runs in the
    stream.

    A failed assertion on a GPU gives no values, so the last ones are copied to host memory for the message.
    """

    def __init__(self):
        self._seen: dict[tuple[str, ...], torch.Tensor] = {}

    def __call__(self, values: Parts) -> None:
        # The parts come before their sum, so that the message names the part at fault.
        order = sorted(values, key=lambda name: name == "loss")
        names = tuple(f"{name} loss" if name in ("retain", "forget") else name for name in order)
        stacked = torch.stack([values[name].detach().float() for name in order])
        if stacked.is_cuda:
            if names not in self._seen:
                self._seen[names] = torch.zeros(len(names), pin_memory=True)
            self._seen[names].copy_(stacked, non_blocking=True)
        for name, finite in zip(names, torch.isfinite(stacked), strict=True):
            torch._assert_async(finite, f"the {name} is not finite")

    def culprit(self) -> str | None:
        """What was not finite on a GPU, where that is known."""
        values = (
            (name, value)
            for names, seen in self._seen.items()
            for name, value in zip(names, seen.tolist(), strict=True)
        )
        return next((name for name, value in values if not math.isfinite(value)), None)


def _optimizer(trained: list[nn.Parameter], settings: Training, device: torch.device) -> torch.optim.AdamW:
    """AdamW; biases, norms and tokens (what has at most one long axis) are not decayed."""
    small = [p for p in trained if max(p.shape, default=1) == p.numel()]
    large = [p for p in trained if max(p.shape, default=1) != p.numel()]
    groups = [{"params": large, "weight_decay": settings.weight_decay}, {"params": small, "weight_decay": 0.0}]
    fused = device.type == "cuda" and not settings.offload_optimizer
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, fused=fused)


class TorchEngine:
    """One plain process."""

    rank, workers = 0, 1

    def __init__(self, objective: Objective, trained: list[nn.Parameter], settings: Training, device: torch.device):
        self.device, self.settings = device, settings
        self.objective = objective.to(device).train()
        self.optimizer = _optimizer(trained, settings, device)
        self.named = _named(objective.student, trained)
        self.finite = FiniteCheck()

    def step(self, batches: Iterable[Batch], lr: float) -> Parts:
        sums: Parts = {}
        batches, trained, method = list(batches), [p for _, p in self.named], self.objective.method
        apart = TermGradients(trained, len(batches)) if method.gradients_apart else None
        for batch in batches:
            batch = self.objective.on(batch, self.device, torch.float32)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16"):
                parts = self.objective(batch)
            self.finite(parts)
            if apart:
                apart.add(terms(parts))
            else:
                (parts["loss"] / len(batches)).backward()
            _add(sums, parts)
        if method.observes:
            method.observe({name: value / len(batches) for name, value in terms(sums).items()})
        if apart:
            for p, gradient in zip(trained, apart.combined(method), strict=True):
                p.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.clip or float("inf"))
        self.finite({"gradient norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums | {"grad_norm": norm}

    def fragments(self) -> list[Fragment]:
        return list(fragments.whole(self.named, self.optimizer))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def gather(self, value: object) -> list:
        return [value]


class DeepSpeedEngine:
    """DeepSpeed inside a process group that Ray Train has made.

    accumulation: micro-batches of this rank a step; micro_batch: rows of each.
    """

    def __init__(
        self, objective: Objective, trained: list[nn.Parameter], settings: Training, device: torch.device,
        accumulation: int, micro_batch: int,
    ):  # fmt: skip
        import torch.distributed as dist

        self.device, self.settings, self.accumulation = device, settings, accumulation
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self._dist, self.objective = dist, objective
        self._apart = objective.method.gradients_apart  # then DeepSpeed sees one backward pass a step
        self.named = _named(objective.student, trained)
        self.finite = FiniteCheck()
        self._engine, optimizer, self._linear = zero.initialize(
            model=objective.to(device),
            optimizer=_optimizer(trained, settings, device),
            model_parameters=trained,
            config=zero.config(
                settings, 1 if self._apart else accumulation, micro_batch, sum(p.numel() for p in trained)
            ),
        )
        self._optimizer: Any = optimizer  # torch's own, or one of ZeRO's, which share no type
        self._engine.train()
        self._plain = settings.zero_stage == 0
        self._dtype = torch.bfloat16 if settings.dtype == "bf16" and not self._plain else torch.float32

    def step(self, batches: Iterable[Batch], lr: float) -> Parts:
        with zero.linear(self._linear):
            return self._step(batches, lr)

    def _step(self, batches: Iterable[Batch], lr: float) -> Parts:
        sums: Parts = {}
        norm = None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for loss in self._combined(batches, sums) if self._apart else self._each(batches, sums):
            self._engine.backward(loss)
            # Without ZeRO DeepSpeed keeps no norm, and updates whatever it is; the gradients are gone after its step.
            if self._plain and self._engine.is_gradient_accumulation_boundary():
                norm = torch.nn.utils.get_total_norm([p.grad for _, p in self.named if p.grad is not None])
                self.finite({"gradient norm": norm})
            self._engine.step()  # updates at the end of the accumulation only
        if not self._apart:
            self._observed(sums)
        norm = torch.as_tensor(self._engine.get_global_grad_norm() if norm is None else norm, device=self.device)
        self.finite({"gradient norm": norm})  # ZeRO has skipped the update then; no checkpoint may count it
        return sums | {"grad_norm": norm}

    def _each(self, batches: Iterable[Batch], sums: Parts) -> Iterator[torch.Tensor]:
        """The loss of every micro-batch; its parts are added to `sums`."""
        for batch in batches:
            parts = self._engine(self.objective.on(batch, self.device, self._dtype))
            self.finite(parts)
            _add(sums, parts)
            yield parts["loss"]

    def _combined(self, batches: Iterable[Batch], sums: Parts) -> Iterator[torch.Tensor]:
        """One loss whose gradient is what the method makes of those of its terms."""
        trained = [p for _, p in self.named]
        apart = TermGradients(trained, self.accumulation)
        for batch in batches:
            batch = self.objective.on(batch, self.device, self._dtype)
            # Past DeepSpeed, which would take each backward pass for a step's.
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self._plain and self.settings.dtype == "bf16"
            ):
                parts = self.objective(batch)
            self.finite(parts)
            apart.add(terms(parts))
            _add(sums, parts)
        self._observed(sums)
        yield self._engine(Imposed(trained, apart.combined(self.objective.method)))["loss"]

    def _observed(self, sums: Parts) -> None:
        """Tell a method that observes its terms their means over all ranks."""
        method, values = self.objective.method, terms(sums)
        if method.observes:
            means = self.mean(torch.stack([value.float() for value in values.values()]) / self.accumulation)
            method.observe(dict(zip(values, means, strict=True)))

    def fragments(self) -> list[Fragment]:
        if self.settings.zero_stage == 3:
            return list(fragments.zero3(self.named, self._optimizer, self.rank))
        if self._plain:
            return list(fragments.whole(self.named, self._optimizer))
        return list(fragments.zero12(self.named, self._optimizer))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        self._dist.all_reduce(total)
        return total / self.workers

    def gather(self, value: object) -> list:
        values = [None] * self.workers
        self._dist.all_gather_object(values, value)
        return values


def _named(student: Adapter, trained: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    wanted = {id(p) for p in trained}
    return [(name, p) for name, p in student.named_parameters() if id(p) in wanted]


def terms(parts: Parts) -> Parts:
    return {name: value for name, value in parts.items() if name != "loss"}


def _add(sums: Parts, parts: Parts) -> None:
    for name, value in parts.items():
        value = value.detach()
        sums[name] = sums[name] + value if name in sums else value
