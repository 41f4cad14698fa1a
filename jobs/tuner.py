"""Ray Tune over the points of a sweep. To be imported where Ray is needed."""

from pathlib import Path
from typing import Any

from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from jobs.point import PointTrainable
from jobs.population import Population
from jobs.suggestions import Listed, Suggestions
from jobs.sweep_state import SweepState
from unlearn.search.space import Sweep

HEAD = "node:__internal_head__"  # every cluster has one of it; what only waits takes no CPU


def tune(
    sweep: Sweep, state: SweepState, desk: Any, scratch: Path, callbacks: list[ray_tune.Callback] | None = None
) -> None:
    """Run points until the sweep ends. scratch: a folder for Ray Tune's own files; callbacks: see jobs/callbacks.py."""
    # Where nothing is learned from a point, the next one is made ready while all slots are at work.
    ahead = 1 if sweep.search_by in ("grid", "random", "pbt") and sweep.stop_early == "none" else 0
    ray_tune.Tuner(
        ray_tune.with_resources(
            ray_tune.with_parameters(PointTrainable, desk=desk), ray_tune.PlacementGroupFactory([{HEAD: 0.001}])
        ),
        tune_config=ray_tune.TuneConfig(
            num_samples=-1, search_alg=search(sweep, state, scratch), scheduler=_scheduler(sweep), reuse_actors=True,
            max_concurrent_trials=sweep.concurrent + ahead,
        ),
        run_config=ray_tune.RunConfig(
            name=sweep.name, storage_path=str(scratch / "tune"), verbose=0, callbacks=callbacks or [],
            checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=ray_tune.FailureConfig(max_failures=3),  # of the process that waits, not of a trial
        ),
    ).fit()  # fmt: skip


def search(sweep: Sweep, state: SweepState, scratch: Path) -> Searcher:
    """What proposes the points of a sweep."""
    if sweep.search_by == "pbt":
        return Population(sweep, state)
    if sweep.search_by in ("grid", "random"):
        return Suggestions(Listed(iter(sweep.grid()) if sweep.search_by == "grid" else sweep.drawn()), state)
    from jobs.study import Study

    return Suggestions(Study(sweep, state, scratch), state)


def _scheduler(sweep: Sweep) -> TrialScheduler | None:
    """What gives up trials by their first objective."""
    if sweep.stop_early == "none":
        return None
    objective = sweep.wanted[0]
    told: Any = {
        "time_attr": "step",
        "metric": objective.figure,
        "mode": "min" if objective.direction == "minimise" else "max",
    }
    if sweep.stop_early == "median":
        return MedianStoppingRule(**told, grace_period=0, min_samples_required=3)
    steps = sweep.settings.training.steps or 1
    return ASHAScheduler(**told, grace_period=sweep.stages(steps)[0], max_t=steps, reduction_factor=2)
