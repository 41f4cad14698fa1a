"""The most memory that a step of a run really holds, byte for byte, as torch's CPU allocator reports it."""

import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch._C._profiler import _EventType

from support.workers import in_group
from unlearn import config

STEP = "one step"


@dataclass(frozen=True)
class Held:
    """Bytes between two steps, and at the worst moment of a step."""

    between: int
    peak: int


def peaks(runs: list[config.RunConfig]) -> list[Held]:
    """What the worker that holds most holds in each run; all runs have the same number of workers."""
    workers = {run.cluster.workers for run in runs}.pop()
    with tempfile.TemporaryDirectory() as folder:
        in_group(_measure, workers, folder, runs)
        found = [
            [Held(*one) for one in json.loads(Path(folder, f"held-{rank}").read_text())] for rank in range(workers)
        ]
    return [max(held, key=lambda one: one.peak) for held in zip(*found, strict=True)]


def _measure(rank: int, folder: str, runs: list[config.RunConfig]) -> None:
    import torch.distributed as dist

    from unlearn.run import resolve
    from unlearn.training import engine
    from unlearn.training.loop import worker

    for kind in (engine.TorchEngine, engine.DeepSpeedEngine):
        kind.step = _marked(kind.step)
    for name in ("all_reduce", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, _patient(getattr(dist, name)))
    found = []
    for run in runs:
        with recorded() as profile:
            worker(resolve(run))
        found.append(astuple(held(profile)))
        gc.collect()
    Path(folder, f"held-{rank}").write_text(json.dumps(found))


def recorded() -> torch.profiler.profile:
    """A context that writes down every allocation of this thread."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def _marked(step: Callable) -> Callable:
    def call(*args):
        with torch.profiler.record_function(STEP):
            return step(*args)

    return call


def _patient(exchange: Callable) -> Callable:
    """Gloo's threads let go of a tensor a moment after the exchange. If they are the last, the profiler does not see
    it: wait."""

    def call(*args, **kwargs):
        work = exchange(*args, **kwargs)
        if work is not None:
            work.wait()
        time.sleep(0.01)
        return work

    return call


def held(profile: torch.profiler.profile) -> Held:
    """From the record of a run: of its steps but the first, the rehearsal, before which the optimizer has no state."""
    allocations, steps, todo = [], [], list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name == STEP:
            steps.append((event.start_time_ns, event.end_time_ns))
    live: dict[int, int] = {}
    before, grown, now = {}, {}, 0
    allocations.sort(reverse=True)
    for start, end in sorted(steps):
        while allocations and allocations[-1][0] < end:
            time_, address, size = allocations.pop()
            if time_ > start:
                before.setdefault(start, now)
            now -= live.pop(address, 0)  # an address that is handed out again was free, whether we were told or not
            if size > 0:
                live[address] = size
                now += size
            if time_ > start:
                grown[start] = max(grown.get(start, 0), now - before[start])
    _, *others = sorted(before)
    # The least of them, should we not have been told.
    between = min(before[step] for step in others)
    return Held(between, between + min(grown[step] for step in others))
