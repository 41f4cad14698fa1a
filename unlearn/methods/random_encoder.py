"""Random encoder (a baseline of arXiv 2402.00351): the embeddings of forget images become Gaussian noise.

loss = mse(E(T(x)), E0(T(x))) over R + alpha · mse(E(T(x)), n) over F,   n ~ N(mean, std²) of the elements of E0(T(x))
over F
"""

import torch

from unlearn.data.loader import Batch
from unlearn.methods.base import AlphaOptions, Method, Terms
from unlearn.methods.encoder_l2 import distance, rows
from unlearn.models.base import Adapter


class RandomEncoder(Method):
    """Send the embeddings of forget images to Gaussian noise of their own mean and spread; the encoder alone is
    trained."""

    name = "random_encoder"
    Options = AlphaOptions
    options: AlphaOptions

    def weights(self) -> dict[str, float]:
        return {"forget": self.options.alpha}

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        assert teacher is not None, "the trainer loads a teacher for every method that needs one"
        with torch.no_grad():
            target = teacher.encode(batch.images, batch.view, batch.seed)
            original = rows(target, batch.retain, None)
            generator = torch.Generator(batch.images.device).manual_seed(batch.seed)
            if isinstance(original, torch.Tensor):
                noise = _noise(original, generator)
            else:
                noise = [_noise(level, generator) for level in original]
        embedding = student.encode(batch.images, batch.view, batch.seed)
        return {
            "retain": distance(rows(embedding, 0, batch.retain), rows(target, 0, batch.retain)),
            "forget": distance(rows(embedding, batch.retain, None), noise),
        }


def _noise(level: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise with the mean and standard deviation of a level's elements."""
    wide = level.to(torch.promote_types(level.dtype, torch.float32))
    drawn = torch.randn(level.shape, generator=generator, device=level.device, dtype=wide.dtype)
    return drawn * wide.std() + wide.mean()
