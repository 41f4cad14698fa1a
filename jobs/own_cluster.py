"""A Ray cluster of this process alone: on loopback, behind a token of its own, in a folder that no other user can
enter.

Whoever reaches a Ray cluster runs commands as its user. Left to itself Ray listens on the machine's outward address,
and makes its folders writable for everyone.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jobs.environment import variables
from unlearn import signals
from unlearn.errors import ClusterError

if TYPE_CHECKING:
    from ray._private.node import Node

# The cluster's folder, for its processes: see jobs/rendezvous.py.
FOLDER = "UNLEARN_RAY_FOLDER"
PREFIX, LOCK = "unl-ray-", "owner"
LONGEST = 22  # characters of the path above it: a socket's path has 107 at most, and Ray adds 85 with ours


@contextlib.contextmanager
def started(environment: dict[str, str]) -> Iterator[None]:
    """The cluster, with all CPUs and GPUs of this machine, and a connection to it. Raises ClusterError.

    environment: of its workers, which inherit it: for a runtime environment Ray would start each of them anew, and the
    two that it starts at once would be of no use.
    """
    import ray

    with _folder() as folder, _authenticated(_environment(folder) | environment):
        try:
            with loopback_as_it_is(), signals.kept():
                ray.init(
                    address="local", num_cpus=max(os.cpu_count() or 1, 1), include_dashboard=False,
                    object_store_memory=256 * 2**20, log_to_driver=False, logging_level=logging.ERROR,
                    configure_logging=True,
                    _node_ip_address="127.0.0.1", _temp_dir=str(folder / "ray"),
                )  # fmt: skip
            yield
        finally:
            with signals.kept(signal.SIGINT), _no_process_left():
                ray.shutdown(wait_for_processes=True)
            from unlearn.data import pixels

            pixels.sweep()  # what workers that had to be killed have left


@contextlib.contextmanager
def _no_process_left() -> Iterator[None]:
    """Around the end of the cluster. Ray asks one process after the other with SIGTERM, which none of them gets (see
    signals.kept), and waits a second for each: what only watches is killed before, what the raylet has started and
    leaves behind, afterwards."""
    import psutil
    from ray._private import ray_constants, worker

    started, node = [], cast("Node | None", worker._global_node)  # of which Ray declares the None alone
    raylet = ray_constants.PROCESS_TYPE_RAYLET
    if node and raylet in node.all_processes:
        with contextlib.suppress(psutil.Error):
            started = psutil.Process(node.all_processes[raylet][0].process.pid).children(recursive=True)
        needed = (raylet, ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_REAPER)
        for kind in [kind for kind in node.all_processes if kind not in needed]:
            node._kill_process_type(kind, check_alive=False, allow_graceful=False, wait=True)
    yield
    for process in started:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(started, timeout=5)


def _environment(folder: Path) -> dict[str, str]:
    """What Ray's processes inherit. The token is in no file, on no command line, and in no runtime environment, which
    Ray logs."""
    loopback = _loopback()
    return {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback, FOLDER: str(folder),
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # A process that asks whether this machine is to be taken away: nobody says so to Ray here.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # An idle process for each core, which the workers, with variables of their own, could not use.
        "RAY_prestart_worker_first_driver": "0",
        # Ray sets these and leaves them behind.
        "RAY_USAGE_STATS_ENABLED": "0", "PYTHONBREAKPOINT": os.environ.get("PYTHONBREAKPOINT", ""),
    }  # fmt: skip


def _loopback() -> str:
    """The name of the loopback interface."""
    import psutil

    return next(name for name, found in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in found))


@contextlib.contextmanager
def loopback_as_it_is() -> Iterator[None]:
    """Ray puts the machine's outward address in the place of 127.0.0.1 unless it is told that clusters are not
    wanted."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _authenticated(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of a cluster. Ray keeps the mode and the token that it has once read: it reads them again,
    before and after."""
    # Ray's stub of its compiled module leaves them out.
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    def read() -> None:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    try:
        with variables(values):
            read()
            yield
    finally:
        read()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder with a short path, for this user alone, gone at the end; those whose owner was killed are removed first.

    A lock on a file in it says that its owner lives. It appears under its name when the lock is held.
    """
    parent = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    if len(str(parent)) > LONGEST:
        raise ClusterError(
            f"RAY_TMPDIR {parent}: too long for the paths of Ray's sockets, {LONGEST} characters at most; /tmp will do"
        )
    _sweep(parent)
    try:
        hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    except OSError as e:
        raise ClusterError(
            f"{parent}: no folder for Ray can be made there ({e.strerror}): name another one in RAY_TMPDIR"
        ) from None
    with open(hidden / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = hidden.rename(parent / hidden.name[1:])
        try:
            yield folder
        finally:
            _remove(folder)


def _sweep(parent: Path) -> None:
    """Remove the folders of this user whose owners are dead."""
    for left in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # no lock, no right to it, or its owner lives
            if left.lstat().st_uid == os.getuid() and not left.is_symlink():
                with open(left / LOCK) as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(left)


def _remove(folder: Path) -> None:
    """The lock goes last, so that what could not be removed is found the next time."""
    for _ in range(10):
        shutil.rmtree(folder / "ray", ignore_errors=True)
        if not (folder / "ray").exists():
            shutil.rmtree(folder, ignore_errors=True)
            return
        time.sleep(0.2)  # a process of Ray that ends has written once more
