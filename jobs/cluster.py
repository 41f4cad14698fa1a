"""Reach a Ray cluster, or start one on this machine, and see that it can carry the run."""

import contextlib
import logging
import os
import signal
import socket
import warnings
from collections.abc import Iterator

from jobs import token
from jobs.environment import variables
from jobs.own_cluster import loopback_as_it_is, started
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

    if ray.is_initialized():
        _check(cluster, workers)
        yield
        return
    warnings.filterwarnings("ignore", module="ray")
    environment = WORKER_ENV | ({} if cluster.gpus_per_worker else {"DS_ACCELERATOR": "cpu"})
    address = _address(cluster)
    if not address:
        check_machine(cluster, workers)
    with (
        variables({name: os.environ.get(name, value) for name, value in POLL.items()}),
        _named(address, environment) if address else started(environment),
    ):
        _check(cluster, workers)
        yield


@contextlib.contextmanager
def _named(address: str, environment: dict[str, str]) -> Iterator[None]:
    """A connection to the cluster that the user names."""
    import ray
    from ray.exceptions import AuthenticationError

    _check_answers(address)
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        token.read()  # one that cannot be sent makes Ray abort this process
    try:
        with loopback_as_it_is() if _on_loopback_alone(address) else contextlib.nullcontext(), signals.kept():
            ray.init(
                address=address, runtime_env={"env_vars": environment}, log_to_driver=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
    except AuthenticationError:
        raise ClusterError(
            f"{address} wants a token, and none was found: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as e:
        why = str(e).splitlines()[0][:160]
        raise ClusterError(
            f"no Ray cluster answers at {address}: {why}; check cluster.address, RAY_AUTH_MODE and RAY_AUTH_TOKEN"
        ) from None
    try:
        yield
    finally:
        with signals.kept(signal.SIGINT):
            ray.shutdown()


def _on_loopback_alone(address: str) -> bool:
    """Whether a cluster listens on this machine's loopback address and not on its outward one, which Ray would ask
    instead."""
    from ray.util import get_node_ip_address

    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        socket.create_connection((get_node_ip_address(), int(port)), timeout=2).close()
        return False
    except OSError:
        return True


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes where nobody listens. Raises ClusterError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as e:
            raise ClusterError(
                f"no Ray cluster answers at {address} ({e.strerror or e}): check cluster.address and the network"
            ) from None


def room(cluster: config.Cluster) -> int:
    """How many workers fit into the connected cluster, by its CPUs and GPUs."""
    import ray

    have = ray.cluster_resources()
    wanted = (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker))
    return int(min(have.get(kind, 0) // each for kind, each in wanted if each))


def waiting_for(cluster: config.Cluster, missing: int = 0) -> str | None:
    """What the connected cluster lacks where a run's workers do not start, in one sentence; None where nothing is seen.

    missing: how many workers have not started, where the caller knows it; else Ray Train's gangs that wait are asked
    for. To be told when a run has been silent for a minute: a cluster that grows, or loses a node, needs some time in
    any case.
    """
    import ray
    from ray.util import placement_group_table

    workers = missing or cluster.min_workers or cluster.workers
    wanted = {"CPU": workers * cluster.cpus_per_worker, "GPU": workers * cluster.gpus_per_worker}
    have, free = ray.cluster_resources(), ray.available_resources()
    for kind, count in wanted.items():
        if count > have.get(kind, 0):
            gone = sum(not node["Alive"] for node in ray.nodes())
            lost = f", {gone} of its nodes gone" if gone else ""
            hint = "" if cluster.min_workers else "; with cluster.min_workers a run goes on with fewer"
            return (
                f"waits for nodes: {_workers(workers)} {count:g} {kind}s, the cluster has "
                f"{have.get(kind, 0):g}{lost}{hint}"
            )
    pending = any(group["state"] in ("PENDING", "RESCHEDULING") for group in placement_group_table().values())
    for kind, count in wanted.items():
        if (missing or pending) and count > free.get(kind, 0):
            return (
                f"waits for room: {_workers(workers)} {count:g} {kind}s, of the cluster's {have[kind]:g} are "
                f"{free.get(kind, 0):g} free; others hold the rest"
            )
    return None


def _workers(count: int) -> str:
    return f"{count} workers want" if count > 1 else "a worker wants"


def check_machine(cluster: config.Cluster, workers: int) -> None:
    """Where no address is given: whether this machine can carry the workers. Raises ClusterError."""
    import torch

    if not _address(cluster):
        have = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
        _compare(cluster, workers, have, "this machine")


def reach(cluster: config.Cluster, workers: int) -> str | None:
    """See that the cluster is there and can carry the workers; the kind of its GPUs, where Ray knows it. Raises
    ClusterError."""
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
                f"cluster.workers {workers} x {key}_per_worker {each:g} = {workers * each:g} {kind}s are asked for, "
                f"{where} has {have.get(kind, 0):g}: lower cluster.workers or cluster.{key}_per_worker"
            )
