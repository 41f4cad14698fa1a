"""Ray's trainer, made so that its run can be stopped. To be imported where Ray is needed."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY  # pyright: ignore[reportAttributeAccessIssue]  not in Ray's stub
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.result import Result

from jobs.own_cluster import FOLDER

PATIENCE = 8  # seconds that the controller has to end its workers: Kubernetes and Slurm allow 30 in all


class StoppableTrainer(TorchTrainer):
    """A run in a thread of its own. Ray's trainer keeps the handle of its controller, the actor that starts and owns
    the workers, to a handler of SIGINT, which ends the process without a message; `_initialize_and_run_controller` is
    otherwise that of Ray 2.60.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._controller: Any = None  # the actor's handle
        self._stopped, self._lock = False, threading.Lock()

    @contextlib.contextmanager
    def fitting(self, check: Callable[[], None]) -> Iterator[Future]:
        """The outcome of `fit`, or what `check` raises before that. After the block no worker is left, however it
        ends."""
        outcome, over = Future(), threading.Event()

        def checked() -> None:
            while not over.wait(1):
                check()

        threads = [threading.Thread(target=_settle, args=(outcome, call), daemon=True) for call in (self.fit, checked)]
        for thread in threads:
            thread.start()
        try:
            yield outcome
        finally:
            over.set()
            self._stop()
            for thread in threads:
                thread.join(PATIENCE)  # Ray aborts a process that leaves while one of its threads waits for Ray

    def _create_default_callbacks(self) -> list:
        """Without those that start a process for each worker group which has nothing to do here: one hands out Ray's
        data sets, one tidies up in a cluster that outlives the driver."""
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if os.environ.get(FOLDER) else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, **controller_init_kwargs) -> Result:
        with self._lock:
            if self._stopped:
                raise RuntimeError("the run was stopped before it began")
            here = ray.get_runtime_context().get_node_id()
            environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | get_env_vars_to_propagate()
            kind = ray.remote(
                num_cpus=0, label_selector={RAY_NODE_ID_KEY: here}, runtime_env={"env_vars": environment}
            )(TrainController)
            self._controller = kind.remote(**controller_init_kwargs)
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())

    def _stop(self) -> None:
        """End controller and workers, where they are there; `fit` raises then."""
        with self._lock:
            self._stopped, controller = True, self._controller
        if controller is None:
            return
        try:
            ray.get(controller.abort.remote(), timeout=PATIENCE)
        except RayError:  # it has ended itself; or it is busy: its workers end with it
            ray.kill(controller)


def _settle(outcome: Future, call: Callable) -> None:
    """What the call returns or raises is the outcome, unless there is one already."""
    with contextlib.suppress(InvalidStateError):
        try:
            result = call()
        except BaseException as e:
            outcome.set_exception(e)
        else:
            outcome.set_result(result)
