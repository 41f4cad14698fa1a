"""Plain training of the whole model: how the embedded models and the retrain oracle are made."""

import torch

from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods.base import Method, Terms
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

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        # A run that names a forget set has its rows in the batch too: they are not learned.
        return {
            "retain": student.training_loss(batch.images[: batch.retain], batch.view.rows(0, batch.retain), batch.seed)
        }


class PretrainFirstStage(Method):
    """Train the frozen first stage (the tokenizer) of a family that has one, before the generator itself."""

    name = "pretrain_first_stage"
    needs_forget = False
    needs_teacher = False
    needs_decoder = True
    trains_first_stage = True
    units = 0  # nobody has counted the first stage's FLOPs

    def check(self, model: type[Adapter]) -> None:
        if model.first_stage_loss is Adapter.first_stage_loss:
            raise ConfigError(
                f"method.name pretrain_first_stage: family {model.family} has no first stage that is trained here"
            )

    def trainable(self, model: Adapter) -> list[torch.nn.Parameter]:
        return model.first_stage_parameters()

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        return {"retain": student.first_stage_loss(batch.images[: batch.retain])}
