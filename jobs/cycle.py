"""Cycle: serve the deletion requests that have accumulated, from the base model, and release what came of it; behind `unlearn cycle`.

    selection = select(cycle)                    # which requests, as a cycle with an id
    for rung in range(cycle.rungs):
        train(cycle, selection, rung)
        evaluate(cycle, selection, rung)         # an audit.json in the run folder is taken in by what follows
        if judge(cycle, selection, rung).passed:
            return release(cycle, selection, rung)
    return give_up(cycle, selection)             # retraining is due

Each step can be repeated, and killed anywhere: it finds what was done in the cycle's folder and does not do it again. The state of a
request follows what is there, never the other way round. A caller owns cycle_dir by its lease meanwhile (`jobs.owner.owned`) and
hands `lease.check` to the steps.
"""

from collections.abc import Callable
from typing import Any

from unlearn.config import RunConfig
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import Judgement, Outcome, Selection

Check = Callable[[], None]
Progress = Callable[[dict], None]


def nothing(*about: Any) -> None: ...


def select(cycle: Cycle) -> Selection:
    """Take the open requests that meet images into a cycle, or find the cycle that was begun and has not ended.

    They become `scheduled`. What meets no image stays `received` and is named in `unmatched`. Costs seconds where nothing is open.
    Raises UnlearnError: no ledger, no data; CycleError where a request that was served before cannot be forgotten again.
    """
    raise NotImplementedError


def opened(cycle: Cycle, id: str) -> Selection:
    """The selection of a cycle that was begun, for a step that is called alone. Raises CycleError where there is none."""
    raise NotImplementedError


def settings(cycle: Cycle, selection: Selection, rung: int) -> RunConfig:
    """The configuration of a rung, as `unlearn run` would take it: its run_dir is the run folder in the cycle's own, its data.forget
    what all requests of the selection name. It may name ids and subjects: keep it out of logs and of parameters."""
    raise NotImplementedError


def train(
    cycle: Cycle, selection: Selection, rung: int, progress: Progress = nothing, check: Check = nothing
) -> str:
    """Train a rung and export it, or go on from its newest checkpoint; the run folder. The requests become `trained`."""
    raise NotImplementedError


def evaluate(
    cycle: Cycle, selection: Selection, rung: int, progress: Callable[[int, int], None] = nothing, check: Check = nothing
) -> dict[str, Any]:
    """Measure a rung; what is in metrics.json. Besides `forget` and `retain` there are the sets `forget_new` and, from the second
    cycle on, `forget_old`: what is asked now, and what was served before."""
    raise NotImplementedError


def judge(cycle: Cycle, selection: Selection, rung: int) -> Judgement:
    """Hold the figures of a rung against the gate. Where it passes the requests become `verified`."""
    raise NotImplementedError


def release(cycle: Cycle, selection: Selection, rung: int, check: Check = nothing) -> Outcome | None:
    """Publish a rung that has passed, make it current, and mark the requests `released`; None where the gate refuses it after all,
    since another release is the parent by now. Rewrites the shards before, where cycle.delete_rows says so."""
    raise NotImplementedError


def give_up(cycle: Cycle, selection: Selection) -> Outcome:
    """No rung has passed: the requests become `received` again, and retraining is due (`Outcome.due`)."""
    raise NotImplementedError


def run(cycle: Cycle, progress: Callable[..., None] = nothing, check: Check = nothing) -> tuple[Selection, Outcome | None]:
    """A whole cycle. (what was selected, how it ended; None where there was nothing to serve)."""
    raise NotImplementedError
