"""A point of a sweep as a trial of Ray Tune: it waits until slots have run the point, and tells Ray Tune its figures.

It computes nothing and imports little, so that many of them cost nothing.
"""

from typing import Any

import ray
from ray import tune


class PointTrainable(tune.Trainable):
    """One stage of the point a step, from "stage" on; it is used for one point after another."""

    # Ray Tune's interface declares `setup(config)`; with_parameters adds the rest.
    def setup(self, config: dict[str, Any], desk: Any = None) -> None:
        self.desk = desk
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.point, self.stage = new_config["point"], new_config.get("stage", 0)
        return True

    def step(self) -> dict[str, Any]:
        ray.get(self.desk.go.remote(self.point, self.stage))
        reply: Any = None
        while reply is None:  # the desk waits a moment before it says that there is none
            reply = ray.get(self.desk.reply.remote(self.point, self.stage))
        self.stage += 1
        return reply
