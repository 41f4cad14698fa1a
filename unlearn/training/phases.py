"""The parts of a run whose method starts from the original weights more than once."""

import torch

from unlearn.methods.base import Method
from unlearn.models.base import Adapter
from unlearn.training.engine import Engine


class Phases:
    """The parts, and the weights that each of them begins with; most methods have one part."""

    def __init__(self, method: Method, steps: int, student: Adapter):
        """student: as the run begins. Raises ConfigError where the run is too short for its parts."""
        self.restarts = method.restarts(steps)
        self._ends = (*self.restarts, steps)
        trained = {id(p) for p in method.trainable(student)} if self.restarts else set()
        self._original = {name: p.detach().clone() for name, p in student.named_parameters() if id(p) in trained}

    def span(self, step: int) -> tuple[int, int]:
        """(steps before the part that step `step`, from 1, is in; its last step)."""
        end = next((end for end in self._ends if step <= end), self._ends[-1])
        return max((before for before in self.restarts if before < end), default=0), end

    def rewind(self, engine: Engine) -> None:
        """Put the original weights into this rank's master weights; a step of the engine brings them to the model."""
        for f in engine.fragments():
            master = f.master()
            original = self._original[f.name].view(-1)[f.start : f.start + f.count]
            master.copy_(original.to(device=master.device, dtype=torch.float32))
