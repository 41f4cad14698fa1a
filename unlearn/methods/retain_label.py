"""Retain label (a baseline of arXiv 2402.00351): the model answers forget images as the original answers images that
are kept.

loss = mse(h(T(x)), h0(T(x))) over R + alpha · mse(h(T(x)), h0(T(x'))) over F,   x' a retained image of the batch, under
x's view
"""

import torch

from unlearn.data.loader import Batch
from unlearn.methods.base import AlphaOptions, Terms
from unlearn.methods.encoder_l2 import another
from unlearn.methods.max_loss import WholeModel
from unlearn.models.base import Adapter


class RetainLabel(WholeModel):
    """Train the model to fill the holes of forget images as the original fills those of retained ones; the whole model
    is trained."""

    name = "retain_label"
    Options = AlphaOptions
    options: AlphaOptions
    needs_teacher = True
    units = 4

    def weights(self) -> dict[str, float]:
        return {"forget": self.options.alpha}

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        assert teacher is not None, "the trainer loads a teacher for every method that needs one"
        with torch.no_grad():
            routed = torch.cat([batch.images[: batch.retain], another(batch.images, batch.retain)])
            target = teacher.predict(routed, batch.view, batch.seed)
        found = student.predict(batch.images, batch.view, batch.seed)
        parts = {"retain": (0, batch.retain), "forget": (batch.retain, len(batch.images))}
        return {
            name: student.difference(found[start:stop], target[start:stop], batch.view.rows(start, stop))
            for name, (start, stop) in parts.items()
        }
