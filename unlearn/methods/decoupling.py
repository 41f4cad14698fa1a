"""Decoupling and retention (arXiv 2502.04260): climb the loss of the forget set until the outputs on it differ enough
from the original's, then fine-tune on the retain set.

    loss = -L(forget)   until   mse(h(T(x)), h0(T(x))) over F >= threshold · mean(h0(T(x))²)
    loss = L(retain)    from then on

L is the loss that the family is pretrained with. Its argument: a model that was retrained without F does not answer it
with noise, so noise is a tell-tale; here what comes out on F is what the retain set teaches.

Climbing may change the decoder alone, and leave in the encoder all that leads back to F. With `climb: encoder`, which
is not the paper's, it goes through the original's decoder: L(forget) is that of D0(E(T(x))), so D rests meanwhile.
"""

import copy
import math
from typing import Literal

import torch
from pydantic import Field

from unlearn.data.loader import Batch
from unlearn.errors import ConfigError
from unlearn.methods.base import ForgetOptions, Terms
from unlearn.methods.max_loss import WholeModel
from unlearn.models.base import Adapter


class DecouplingOptions(ForgetOptions):
    """How far it climbs, and with what."""

    threshold: float = Field(
        default=0.5,
        gt=0,
        allow_inf_nan=False,
        description=(
            "how far the outputs on the forget set must be from the original's, as a share of their mean square"
        ),
    )
    climb: Literal["all", "encoder"] = Field(
        default="all", description="what moves until then; the retain set is learnt by encoder and decoder either way"
    )


class Decoupling(WholeModel):
    """Climb the loss of the forget set until its outputs have changed enough, then fine-tune on the retain set; all is
    trained."""

    name = "decoupling"
    Options = DecouplingOptions
    options: DecouplingOptions
    needs_teacher = True
    observes = True
    loss_options = (*WholeModel.loss_options, "threshold", "climb")
    units = 3.5  # the teacher sees the forget half alone

    def __init__(self, options: DecouplingOptions):
        super().__init__(options)
        self.apart = torch.zeros((), dtype=torch.bool)

    def check(self, model: type[Adapter]) -> None:
        super().check(model)
        if self.options.climb == "encoder" and self.options.saliency is not None:
            raise ConfigError(
                "method.climb encoder with method.saliency: the forget term has no gradient in the decoder, which "
                "would never move; give climb: all, or no saliency"
            )

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        assert teacher is not None, "the trainer loads a teacher for every method that needs one"
        climber = student if self.options.climb == "all" else _with_decoder_of(teacher, student)
        retain, view = batch.images[: batch.retain], batch.view.rows(0, batch.retain)
        terms = {"retain": student.training_loss(retain, view, batch.seed)}
        forget, view = batch.images[batch.retain :], batch.view.rows(batch.retain, len(batch.images))
        found = climber.predict(forget, view, batch.seed)
        terms["forget"] = climber.loss(found, climber.targets(forget, view, batch.seed), view)
        with torch.no_grad():
            original = teacher.predict(forget, view, batch.seed)
            size = student.difference(original, torch.zeros_like(original), view).clamp_min(1e-12)
            return terms | {"difference": student.difference(found, original, view) / size}

    def loss(self, terms: Terms) -> torch.Tensor:
        return torch.where(self.apart.to(terms["retain"].device), terms["retain"], -terms["forget"])

    def observe(self, values: Terms) -> None:
        self.apart = self.apart.to(values["difference"].device) | (values["difference"] >= self.options.threshold)

    def doubt(self, row: dict) -> str | None:
        if not math.isclose(row["loss"], -row["forget"], rel_tol=1e-6):
            return None
        return (
            f"the run ended while it climbed: outputs on the forget set differ by {row['difference']:.2g} of their "
            f"mean square, method.threshold is {self.options.threshold:g}. The retain set was never learnt, so the "
            "model is damaged: give a lower threshold, or more steps"
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"apart": self.apart}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.apart = state["apart"]


def _with_decoder_of(teacher: Adapter, student: Adapter) -> Adapter:
    """The student's encoder before the teacher's decoder, no weight copied."""
    made = copy.copy(student)
    made._modules = student._modules | {"decoder": teacher.decoder}
    return made
