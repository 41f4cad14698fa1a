"""Methods for tests alone: what the contract allows and no method of the project needs yet."""

import torch

from unlearn.data.loader import Batch
from unlearn.methods.base import Gradients, Terms
from unlearn.methods.encoder_l2 import EncoderL2, distance
from unlearn.models.base import Adapter

# name -> where it is, as METHODS has it
TOYS = {name: f"support.methods:{cls}" for name, cls in (
    ("toy_sum", "Sum"), ("toy_projected", "Projected"), ("toy_remembering", "Remembering"), ("toy_twice", "Twice"),
    ("toy_endless", "Endless"),
)}  # fmt: skip


class Sum(EncoderL2):
    """The paper's method, its gradients taken apart and added again."""

    name = "toy_sum"
    gradients_apart = True

    def combine(self, gradients: Gradients, dot) -> list[torch.Tensor]:
        return [r + self.options.alpha * f for r, f in zip(gradients["retain"], gradients["forget"], strict=True)]


class Projected(EncoderL2):
    """Of the forget term's gradient only what is orthogonal to that of the retain term."""

    name = "toy_projected"
    gradients_apart = True

    def combine(self, gradients: Gradients, dot) -> list[torch.Tensor]:
        retain, forget = gradients["retain"], gradients["forget"]
        share = dot(forget, retain) / dot(retain, retain).clamp_min(1e-12)  # at first the student is the teacher
        return [r + f - share * r for r, f in zip(retain, forget, strict=True)]


class Twice(EncoderL2):
    """The paper's method, the encoder called once for the retain rows and once for the forget rows: each of its modules
    is used twice before the way back."""

    name = "toy_twice"

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        assert teacher is not None
        with torch.no_grad():
            routed = torch.cat([batch.images[: batch.retain], self.target(batch, student)])
            wanted = teacher.encode(routed, batch.view, batch.seed)
        made = {}
        for name, start, stop in (("retain", 0, batch.retain), ("forget", batch.retain, len(routed))):
            found = student.encode(batch.images[start:stop], batch.view.rows(start, stop), batch.seed)
            made[name] = distance(found, wanted[start:stop])
        return made


class Remembering(EncoderL2):
    """Counts its steps, and turns with them from one term to the other; the mean gradient's size decides how fast."""

    name = "toy_remembering"
    gradients_apart = True

    def __init__(self, options):
        super().__init__(options)
        self.steps, self.size = torch.zeros((), dtype=torch.int64), torch.zeros(3)

    def combine(self, gradients: Gradients, dot) -> list[torch.Tensor]:
        self.steps = self.steps + 1
        self.size = 0.9 * self.size + 0.1 * dot(gradients["retain"], gradients["retain"]).sqrt()
        share = self.steps / (self.steps + 1 + self.size[0])
        return [(1 - share) * r + share * f for r, f in zip(gradients["retain"], gradients["forget"], strict=True)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"steps": self.steps, "size": self.size}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.steps, self.size = state["steps"], state["size"]


class Endless(EncoderL2):
    """A finite loss whose gradient is not."""

    name = "toy_endless"

    def terms(self, batch: Batch, student: Adapter, teacher: Adapter | None) -> Terms:
        found = student.encode(batch.images, batch.view, batch.seed).float()
        return super().terms(batch, student, teacher) | {"endless": (found - found.detach()).sum().sqrt()}
