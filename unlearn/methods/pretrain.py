"""Plain training of the whole model: how the embedded models and the retrain oracle are made."""

import torch

from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods.base import Generator, Method
from unlearn.models.base import Adapter


class Pretrain(Method):
    """Train the whole model from nothing with its family's own loss, on the retain set alone."""

    name = "pretrain"
    needs_forget = False
    needs_teacher = False
    needs_decoder = True
    units = 3

    def trainable(self, model: Adapter) -> list[torch.nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    def loss(self, batch: Batch, student: Generator, teacher: Generator | None) -> dict[str, torch.Tensor]:
        # A run that names a forget set has its rows in the batch too: they are not learned.
        loss = student.training_loss(batch.images[: batch.retain], batch.view.rows(0, batch.retain), batch.seed)
        return {"loss": loss, "retain": loss.detach()}


class PretrainFront(Method):
    """Train the frozen front end (the tokenizer) of a family that has one, before the generator itself."""

    name = "pretrain_front"
    needs_forget = False
    needs_teacher = False
    needs_decoder = True
    trains_front = True
    units = 0  # nobody has counted the front's FLOPs

    def check(self, model: type[Adapter]) -> None:
        if model.front_loss is Adapter.front_loss:
            raise ConfigError(f"method.name pretrain_front: family {model.family} has no front end that is trained here")

    def trainable(self, model: Adapter) -> list[torch.nn.Parameter]:
        return model.front_parameters()

    def loss(self, batch: Batch, student: Generator, teacher: Generator | None) -> dict[str, torch.Tensor]:
        loss = student.front_loss(batch.images[: batch.retain])
        return {"loss": loss, "retain": loss.detach()}
