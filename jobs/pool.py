"""Map pieces of work over workers: Ray actors on a cluster, or this process where one worker is enough.

A task is a class that is built once in each worker, with the arguments it is given there, and called with piece after
piece, and with what the pieces of one call have in common.
"""

import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from unlearn import config, signals
from unlearn import log as logs
from unlearn.errors import MissingExtra, StorageError, UnlearnError, WorkerDied

AHEAD = 4  # pieces that each worker has waiting, so that it works on while the driver computes
RETRIES = 3  # of a piece whose worker dies

# Maps pieces to results, in the order of the pieces. What follows the pieces goes to the task with each of them.
Map = Callable[..., Iterator[Any]]


@contextlib.contextmanager
def pool(
    task: Callable[..., Callable[..., Any]], *arguments: Any, cluster: config.Cluster, workers: int, here: bool
) -> Iterator[Map]:
    """A function that maps pieces over `workers` workers, each with a task(*arguments) of its own: mapped(pieces,
    *common) gives the task's (piece, *common) of each.

    here: whether one worker is this process even where there is a cluster; without one it always is. A run that goes on
    with fewer workers (cluster.min_workers) is given fewer. The arguments are sent to the cluster once, what pieces
    have in common once a call. Raises UnlearnError as the task does, WorkerDied where the workers of a piece die too
    often, and ClusterError where the cluster has too little.
    """
    if workers == 1 and (here or not on_cluster(cluster)):
        import torch

        threads = torch.get_num_threads()
        try:
            call = task(*arguments)
            yield lambda pieces, *common: (call(piece, *common) for piece in pieces)
        finally:
            torch.set_num_threads(threads)
        return

    from jobs.cluster import connected, room

    with connected(cluster, min(workers, cluster.min_workers or workers)):
        import ray

        kind = ray.remote(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_restarts=-1,  # counted by piece: over many pieces workers may be taken away more often
            max_task_retries=RETRIES,
        )(_Actor)
        # In a list, which a worker looks into once. Ray cannot start an actor again whose own arguments lie in its
        # object store.
        shared = [ray.put(arguments)]
        actors: list[Any] = [kind.remote(task, logs.level(), number) for number in range(min(workers, room(cluster)))]
        try:
            yield lambda pieces, *common: _in_order(actors, shared, pieces, common)
        finally:
            for actor in actors:
                ray.kill(actor)
            actors.clear()  # while the cluster is there: an exception on its way keeps this frame until after its end


def on_cluster(cluster: config.Cluster) -> bool:
    """Whether a Ray cluster is named, or this process is connected to one."""
    ray = sys.modules.get("ray")
    return bool(cluster.address or os.environ.get("RAY_ADDRESS") or (ray and ray.is_initialized()))


class _Actor:
    """A task in a process of its own. A mistake of the user comes back as a value, to be told once and not retried."""

    def __init__(self, task: Callable, level: str, number: int):
        logs.start_worker(level, worker=number, host=socket.gethostname())
        signals.show_stacks()
        self.task, self.call = task, None
        self.common: tuple[Any, tuple] = (None, ())  # as it lies in the object store, and here

    def run(self, shared: list, common: list, piece: Any) -> tuple[bool, Any]:
        import ray

        try:
            self.call = self.call or self.task(*ray.get(shared[0]))
            if self.common[0] != common[0]:
                self.common = common[0], ray.get(common[0])
            return True, self.call(piece, *self.common[1])
        except UnlearnError as e:
            # Of the kinds that the driver tells apart: others are not all to be pickled.
            if isinstance(e, MissingExtra):
                return False, e
            kind = StorageError if isinstance(e, StorageError) else UnlearnError
            return False, kind(str(e))


def _in_order(actors: list, shared: list, pieces: Iterable[Any], common: tuple) -> Iterator[Any]:
    import ray

    ahead: deque = deque()
    together = [ray.put(common)]
    for number, piece in enumerate(pieces):
        ahead.append(actors[number % len(actors)].run.remote(shared, together, piece))
        if len(ahead) == AHEAD * len(actors):
            yield _result(ahead.popleft())
    while ahead:
        yield _result(ahead.popleft())


def _result(future) -> Any:
    import ray
    from ray.exceptions import RayActorError

    try:
        good, result = ray.get(future)
    except RayActorError as e:
        told = str(e).splitlines()[0][:160]
        raise WorkerDied(f"a worker died more than {RETRIES} times: {told}; it may need more memory") from None
    if not good:
        raise result
    return result
