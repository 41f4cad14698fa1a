"""How the workers of a run find each other: as Ray has it, or on a cluster of this process alone by a file.

torch's own store for it listens on every address of the machine and asks nobody who they are.
"""

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

from jobs.own_cluster import FOLDER


def torch_config(backend: str, timeout: int = 1800) -> TorchConfig:
    """For the connected cluster. backend: gloo or nccl; timeout: seconds that a collective waits."""
    folder = os.environ.get(FOLDER)
    if folder:
        return FileRendezvous(backend=backend, timeout_s=timeout, folder=folder)
    return TorchConfig(backend=backend, timeout_s=timeout)


@dataclass
class FileRendezvous(TorchConfig):
    """folder: a path that all workers have and no other user."""

    folder: str = ""

    @property
    def backend_cls(self):
        return _FileBackend


class _FileBackend(_TorchBackend):
    # Any: Ray declares that it returns another class of ObjectRef than ray.get takes.
    def on_start(self, worker_group: Any, backend_config: FileRendezvous) -> None:
        file = Path(
            backend_config.folder, f"workers-{uuid.uuid4().hex}"
        )  # another one for each start: the store is used once
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get([
            worker_group.execute_single_async(
                rank, _setup_torch_process_group, backend=backend_config.backend, world_rank=rank,
                world_size=len(worker_group),
                init_method=file.as_uri(), timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ])  # fmt: skip
