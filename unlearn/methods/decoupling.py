"""Decoupling and retention (arXiv 2502.04260): climb the loss of the forget set until the outputs on it differ enough
from the original's, then fine-tune on the retain set.

    loss = -L(forget)   until   mse(h(T(x)), h0(T(x))) over F >= threshold · mean(h0(T(x))²)
    loss = L(retain)    from then on

L is the loss that the family is pretrained with. Its argument: a model that was retrained without F does not answer it
with noise, so noise is a tell-tale; here what comes out on F is what the retain set teaches.
"""

import torch
from pydantic import Field

from unlearn.data.loader import Batch
from unlearn.methods.base import ForgetOptions, Terms
from unlearn.methods.max_loss import WholeModel, losses
from unlearn.models.base import Adapter


class DecouplingOptions(ForgetOptions):
    """How far it climbs."""

    threshold: float = Field(
        default=0.5,
        gt=0,
        allow_inf_nan=False,
        description=(
            "how far the outputs on the forget set must be from the original's, as a share of their mean square"
        ),
    )


class Decoupling(WholeModel):
    """Climb the loss of the forget set until its outputs have changed enough, then fine-tune on the retain set; all is
    trained."""

    name = "decoupling"
    Options = DecouplingOptions
    options: DecouplingOptions
    needs_teacher = True
    observes = True
    loss_options = (*WholeModel.loss_options, "threshold")
    units = 4

    def __init__(self, options: DecouplingOptions):
        super().__init__(options)
        self.apart = torch.zeros((), dtype=torch.bool)

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        assert teacher is not None, "the trainer loads a teacher for every method that needs one"
        found = student.predict(batch.images, batch.view, batch.seed)
        forget, view = slice(batch.retain, None), batch.view.rows(batch.retain, len(batch.images))
        with torch.no_grad():
            original = teacher.predict(batch.images, batch.view, batch.seed)[forget]
            size = student.difference(original, torch.zeros_like(original), view).clamp_min(1e-12)
            difference = student.difference(found.detach()[forget], original, view) / size
        return losses(student, batch, found) | {"difference": difference}

    def loss(self, terms: Terms) -> torch.Tensor:
        return torch.where(self.apart.to(terms["retain"].device), terms["retain"], -terms["forget"])

    def observe(self, values: Terms) -> None:
        self.apart = self.apart.to(values["difference"].device) | (values["difference"] >= self.options.threshold)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"apart": self.apart}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.apart = state["apart"]
