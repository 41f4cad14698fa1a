"""Reach a Ray cluster, or start one on this machine, and see that it can carry the run."""

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator

from unlearn import config, signals
from unlearn.errors import ClusterError

# Set for the workers before Ray starts them. Page faults are dear in small allocations that come and go every step.
WORKER_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "TOKENIZERS_PARALLELISM": "false",
}
# How often Ray Train's controller looks at its workers: reports wait for it.
POLL = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


@contextlib.contextmanager
def connected(cluster: config.Cluster, workers: int) -> Iterator[None]:
    """A Ray connection for the length of a job. Raises ClusterError where the resources are not there."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        with signals.kept():
            _connect(cluster, workers)
    try:
        _check(cluster, workers)
        yield
    finally:
        if mine:
            ray.shutdown()


def _connect(cluster: config.Cluster, workers: int) -> None:
    import ray

    for name, value in POLL.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module="ray")
    environment = {"env_vars": WORKER_ENV | ({} if cluster.gpus_per_worker else {"DS_ACCELERATOR": "cpu"})}
    if address := _address(cluster):
        _check_answers(address)
        try:
            ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise ClusterError(f"no Ray cluster answers at {address}: {str(e).splitlines()[0][:160]}; check cluster.address") from None
        return
    check_machine(cluster, workers)
    # A cluster of this process alone, on loopback, gone with it: there is nobody to authenticate.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    ray.init(
        address="local", num_cpus=max(os.cpu_count() or 1, 1), include_dashboard=False, runtime_env=environment,
        object_store_memory=256 * 2**20, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True,
    )  # fmt: skip


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes where nobody listens. Raises ClusterError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as e:
            raise ClusterError(f"no Ray cluster answers at {address} ({e.strerror or e}): check cluster.address and the network") from None


def room(cluster: config.Cluster) -> int:
    """How many workers fit into the connected cluster, by its CPUs and GPUs."""
    import ray

    have = ray.cluster_resources()
    wanted = (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker))
    return int(min(have.get(kind, 0) // each for kind, each in wanted if each))


def check_machine(cluster: config.Cluster, workers: int) -> None:
    """Where no address is given: whether this machine can carry the workers. Raises ClusterError."""
    import torch

    if not _address(cluster):
        have = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
        _compare(cluster, workers, have, "this machine")


def reach(cluster: config.Cluster, workers: int) -> str | None:
    """See that the cluster is there and can carry the workers; the kind of its GPUs, where Ray knows it. Raises ClusterError."""
    if not _address(cluster):
        check_machine(cluster, workers)
        return None
    with connected(cluster, workers):
        import ray

        kinds = (name.partition(":")[2] for name in ray.cluster_resources() if name.startswith("accelerator_type:"))
        return next(kinds, None)


def _address(cluster: config.Cluster) -> str | None:
    return cluster.address or os.environ.get("RAY_ADDRESS")


def _check(cluster: config.Cluster, workers: int) -> None:
    import ray

    _compare(cluster, workers, ray.cluster_resources(), "the cluster")


def _compare(cluster: config.Cluster, workers: int, have: dict, where: str) -> None:
    for kind, each, key in (("CPU", cluster.cpus_per_worker, "cpus"), ("GPU", cluster.gpus_per_worker, "gpus")):
        if workers * each > have.get(kind, 0):
            raise ClusterError(
                f"cluster.workers {workers} x {key}_per_worker {each:g} = {workers * each:g} {kind}s are asked for, {where} has "
                f"{have.get(kind, 0):g}: lower cluster.workers or cluster.{key}_per_worker"
            )
