"""Plain training of the whole model: how the embedded models and the retrain oracle are made."""

import torch

from unlearn.data.loader import Batch
from unlearn.methods.base import Generator, Method
from unlearn.models.base import Adapter


class Pretrain(Method):
    """The family's own training loss, on the retain set alone."""

    name = "pretrain"
    needs_forget = False
    needs_teacher = False
    needs_decoder = True
    units = 3

    def trainable(self, model: Adapter) -> list[torch.nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    def loss(self, batch: Batch, student: Generator, teacher: Generator | None) -> dict[str, torch.Tensor]:
        loss = student.training_loss(batch.images, batch.view)
        return {"loss": loss, "retain": loss.detach()}
