"""Noisy label (a baseline of arXiv 2402.00351): L(retain) + alpha · L(forget), with Gaussian noise to be predicted on
forget images.

What is hidden of a forget image is replaced by noise, so that noise is what the family's own loss asks for; for MAGE
the tokens of images of noise. A diffusion model sees pure noise in the hole then, and is to predict what was added to
it.
"""

from dataclasses import replace

import torch

from unlearn.data.loader import Batch
from unlearn.methods.base import AlphaOptions, Terms
from unlearn.methods.max_loss import WholeModel, losses
from unlearn.models.base import Adapter


class NoisyLabel(WholeModel):
    """Train the model to fill the holes of forget images with Gaussian noise; the whole model is trained."""

    name = "noisy_label"
    Options = AlphaOptions
    options: AlphaOptions

    def weights(self) -> dict[str, float]:
        return {"forget": self.options.alpha}

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        images = batch.images[batch.retain :]
        noise = student.noise_like(images, torch.Generator(images.device).manual_seed(batch.seed))
        noisy = student.fill_hole(images, noise, batch.view.rows(batch.retain, len(batch.images)))
        batch = replace(batch, images=torch.cat([batch.images[: batch.retain], noisy]))
        return losses(student, batch, student.predict(batch.images, batch.view, batch.seed))
