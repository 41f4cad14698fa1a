"""A run's own Ray cluster and strangers: other machines, other users, whoever has no token."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from support.ray_nodes import until
from support.runs import tiny_config

from jobs import own_cluster
from jobs.cluster import connected, waiting_for
from unlearn import config
from unlearn.errors import ClusterError
from unlearn.training import metrics
from unlearn.training.checkpoint import Checkpoints

# Trains as long as it is looked at.
ENDLESS = [
    "training.engine=deepspeed", "cluster.workers=2", "training.micro_batch_size=4", "training.steps=1000000",
    "training.log_every=5",
    "training.checkpoint_every=20", "training.schedule=constant", "method.name=pretrain",
]  # fmt: skip
# What a stranger does: joins the cluster, and has it run a command.
CLIENT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=0)
def command():
    return "it ran"
print(ray.get(command.remote(), timeout=600))
"""


@dataclass
class Training:
    """A run that trains on its own cluster. parent: of the cluster's folder; home: the user's."""

    driver: subprocess.Popen
    parent: Path
    home: Path

    @property
    def folder(self) -> Path:
        [folder] = self.parent.glob("unl-ray-*")
        return folder

    def processes(self) -> dict[int, psutil.Process]:
        """The driver and all that it has started, directly or not: all of Ray inherits the cluster's folder."""
        driver = psutil.Process(self.driver.pid)
        found = {p.pid: p for p in [driver, *driver.children(recursive=True)]}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(own_cluster.FOLDER) == str(self.folder):
                    found[process.pid] = process
        return found

    def signal_workers(self, sign: signal.Signals) -> None:
        """What is stopped keeps its sockets and its memory, and takes no core from other tests."""
        for process in self.processes().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in process.name():
                    process.send_signal(sign)

    def token(self) -> str:
        return next(p.environ()["RAY_AUTH_TOKEN"] for p in self.processes().values() if p.name() == "raylet")

    def gcs(self) -> str:
        """The address by which a client joins."""
        [server] = [p for p in self.processes().values() if p.name() == "gcs_server"]
        [port] = {c.laddr.port for c in listening(server)}
        return f"127.0.0.1:{port}"


def listening(process: psutil.Process) -> list:
    return [
        c
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN or c.type.name == "SOCK_DGRAM" and not c.raddr
    ]


def clean() -> dict[str, str]:
    """This process's environment without anything of Ray's."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_worker_niceness": "0"}


@pytest.fixture(scope="module")
def training(tiny_shards, tiny_model, tmp_path_factory) -> Iterator[Training]:
    folder = tmp_path_factory.mktemp("strangers")
    run = tiny_config(folder / "run", tiny_shards, tiny_model, *ENDLESS)
    (folder / "run.yaml").write_text(config.dump(run))
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as parent:
        env = clean() | {"RAY_TMPDIR": parent, "HOME": str(folder), "RAY_AUTH_MODE": "disabled"}
        driver = subprocess.Popen(
            [sys.executable, "-m", "unlearn", "pretrain", folder / "run.yaml"],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            until(lambda: driver.poll() is not None or metrics.read(run.run_dir))
            assert driver.poll() is None, driver.communicate()[1]
            found = Training(driver, Path(parent), folder)
            found.signal_workers(signal.SIGSTOP)
            yield found
        finally:
            if driver.poll() is None:
                Training(driver, Path(parent), folder).signal_workers(signal.SIGCONT)
                driver.terminate()
                driver.communicate(timeout=600)


def test_every_socket_of_a_run_that_trains_is_on_loopback(training):
    """The driver's, Ray's (GCS, raylet, both agents, workers), and those of the process group between the workers."""
    found, names = {}, set()
    for process in training.processes().values():
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
            names.add(process.name().partition(".")[0])
            for connection in listening(process):
                found[process.name(), connection.laddr.port] = connection.laddr.ip.removeprefix("::ffff:")
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= names, names
    assert any("RayTrainWorker" in name for name, _ in found), found
    assert len(found) >= 8 and set(found.values()) <= {"127.0.0.1", "::1"}, found


def test_who_has_not_the_token_is_refused(training):
    def client(**env) -> subprocess.Popen:
        env = clean() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HOME": str(training.parent)} | env
        command = [sys.executable, "-c", CLIENT, training.gcs()]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    clients = {
        "none": client(RAY_AUTH_MODE="disabled"),
        "wrong": client(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
        "right": client(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=training.token()),
    }
    [agent] = [
        p for p in training.processes().values() if p.name() == "ray::RuntimeEnvAgent"
    ]  # it installs what it is told to
    [port] = {c.laddr.port for c in listening(agent)}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/get_or_create_runtime_env", data=b"", timeout=600)
    said = {who: process.communicate(timeout=600)[0] for who, process in clients.items()}
    assert clients["right"].returncode == 0 and "it ran" in said["right"], said["right"]
    for who in ("none", "wrong"):
        assert clients[who].returncode != 0 and "it ran" not in said[who] and "nauthenticated" in said[who], said[who]


def test_the_token_is_in_no_file_and_on_no_command_line_and_nobody_else_can_enter(training):
    secret = training.token()
    assert len(secret) == 64
    shown = [" ".join(p.cmdline()) for p in training.processes().values() if p.is_running()]
    written = [path for folder in (training.parent, training.home) for path in folder.rglob("*") if path.is_file()]
    assert any("gcs_server" in line for line in shown) and any(path.name.startswith("raylet") for path in written)
    assert not [line for line in shown if secret in line]
    assert not [path for path in written if secret.encode() in path.read_bytes()]
    assert training.folder.stat().st_mode & 0o777 == 0o700 and not (training.home / ".ray").exists()


def test_sigterm_to_all_of_its_processes_ends_it_as_to_the_driver_alone(training):
    """As Slurm does it. The last test that looks at this run: no process and no folder of it is left."""
    checkpoints = Checkpoints(str(training.home / "run"), 2)
    training.signal_workers(signal.SIGCONT)
    until(lambda: training.driver.poll() is not None or checkpoints.steps())
    left = [p for p in training.processes().values() if p.pid != training.driver.pid]
    os.killpg(training.driver.pid, signal.SIGTERM)
    err = training.driver.communicate(timeout=600)[1]
    assert training.driver.returncode == 128 + signal.SIGTERM and "Traceback" not in err and "***" not in err, err
    [line] = [line for line in err.splitlines() if "stopped:" in line]
    assert "is saved; go on with" in line
    assert not psutil.wait_procs(left, timeout=600)[1], "processes outlive the driver"
    assert not list(training.parent.iterdir()), "a session's folder stays behind"


def test_a_cluster_leaves_the_process_as_it_was_and_says_what_is_waited_for(monkeypatch):
    """Also where Ray is imported and has looked at its variables before; of two clusters in one process each has a
    token of its own."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as parent:
        monkeypatch.setenv("RAY_TMPDIR", parent)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        before = dict(os.environ)
        cpus = os.cpu_count()
        mine = config.Cluster(workers=cpus)
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        with connected(mine, cpus):
            inside = dict(os.environ)
            assert waiting_for(mine) is None
            others = ray.util.placement_group([{"CPU": 1}])
            ray.get(others.ready(), timeout=600)
            until(lambda: ray.available_resources().get("CPU", 0) == cpus - 1)
            assert waiting_for(mine) is None  # nobody waits: it may be our own workers that hold it
            ours = ray.util.placement_group([{"CPU": 1}] * cpus)
            room = until(lambda: waiting_for(mine))
            ray.util.remove_placement_group(ours)
            assert (
                "0 free" not in room
                and f"waits for room: {cpus} workers want {cpus} CPUs, of the cluster's {cpus} are {cpus - 1} free"
                in room
            )
            assert "waits for room: " in waiting_for(mine, missing=cpus)
            gone = waiting_for(config.Cluster(workers=999))
            assert (
                "waits for nodes: 999 workers want 999 CPUs" in gone
                and "with cluster.min_workers a run goes on" in gone
            )
            assert "min_workers" not in waiting_for(config.Cluster(workers=999, min_workers=998))
        assert dict(os.environ) == before and not list(Path(parent).iterdir())
        [caught] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigCgt")]
        assert int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1, "Ray has taken the handler of SIGTERM away"
        signal.signal(signal.SIGTERM, handler)
        assert inside["RAY_AUTH_MODE"] == "token" and inside["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.3"
        from ray._raylet import AuthenticationMode, get_authentication_mode

        assert get_authentication_mode() == AuthenticationMode.DISABLED  # what the user's own clusters are reached with


HOLDER = """
import sys, time
from jobs.own_cluster import _folder
with _folder() as folder:
    (folder / "ray").mkdir()
    print(folder, flush=True)
    time.sleep(7200)
"""


def test_the_folder_of_a_killed_driver_goes_with_the_next_start(monkeypatch, tmp_path):
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as parent:
        monkeypatch.setenv("RAY_TMPDIR", parent)
        command = [sys.executable, "-c", HOLDER]
        killed, alive = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
        try:
            left, held = (Path(process.stdout.readline().strip()) for process in (killed, alive))
            killed.kill(), killed.wait()
            others = Path(parent, "unl-ray-results")  # of the user's own, and like ours by its name alone
            others.mkdir()
            with own_cluster._folder() as mine:
                assert not left.exists() and held.exists() and others.exists() and mine.exists()
            assert not mine.exists()
        finally:
            killed.kill(), alive.kill()
        monkeypatch.setenv("RAY_TMPDIR", f"{parent}/{'x' * 30}")
        with pytest.raises(ClusterError, match="RAY_TMPDIR .*: too long for the paths of Ray's sockets"):
            with own_cluster._folder():
                pass
        monkeypatch.setenv("RAY_TMPDIR", f"{parent}/none")
        with pytest.raises(ClusterError, match="no folder for Ray can be made there .No such file or directory."):
            with own_cluster._folder():
                pass
