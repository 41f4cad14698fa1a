"""Plain training of the whole model: how the embedded models and the retrain oracle are made."""

import torch

from unlearn.data.loader import Batch
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
        loss = student.training_loss(batch.images[: batch.retain], batch.view.rows(0, batch.retain))
        return {"loss": loss, "retain": loss.detach()}
