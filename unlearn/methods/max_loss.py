"""Maximum loss (a baseline of arXiv 2402.00351): L(retain) - alpha · L(forget), L the loss that the family is
pretrained with.

It has no lower bound, so alpha, the learning rate and the steps decide how far it goes.
"""

import torch

from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods.base import AlphaOptions, Method, Terms
from unlearn.models.base import Adapter


def losses(student: Adapter, batch: Batch, predictions: torch.Tensor) -> Terms:
    """{"retain", "forget"}: the family's own loss of either part of a batch, of what the student predicts for the
    whole."""
    targets = student.targets(batch.images, batch.view, batch.seed)
    parts = {"retain": (0, batch.retain), "forget": (batch.retain, len(batch.images))}
    return {
        name: student.loss(predictions[start:stop], targets[start:stop], batch.view.rows(start, stop))
        for name, (start, stop) in parts.items()
    }


class WholeModel(Method):
    """A method that trains encoder and decoder."""

    needs_teacher = False
    needs_decoder = True
    units = 3

    def check(self, model: type[Adapter]) -> None:
        if model.predict is Adapter.predict:
            raise ConfigError(f"method.name {self.name}: family {model.family} does not say what its decoder predicts")

    def trainable(self, model: Adapter) -> list[torch.nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]


class MaxLoss(WholeModel):
    """Raise the model's own loss on the forget set, keep it low on the retain set; the whole model is trained."""

    name = "max_loss"
    Options = AlphaOptions
    options: AlphaOptions

    def weights(self) -> dict[str, float]:
        return {"forget": -self.options.alpha}

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        return losses(student, batch, student.predict(batch.images, batch.view, batch.seed))
