"""A real Ray cluster of two nodes on loopback, with token authentication, as `ray start` makes it."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from support.programs import free_ports

TOKEN = "a-token-of-the-tests-0123456789"


def until(condition, seconds: float = 600):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)
    return found


class Cluster:
    """Two nodes, "head" and "second", with one CPU each; or, alone, a head with two CPUs that takes no jobs, which
    starts sooner. folder: its path must be short, for Ray's sockets."""

    def __init__(self, folder: Path, alone: bool = False):
        self.folder, self.alone = folder, alone
        (folder / "home").mkdir()
        self.ports = free_ports(3)
        self.address = f"http://127.0.0.1:{self.ports[1]}"
        self.start_head()
        if not alone:
            self.start_second()

    def start_head(self) -> None:
        """The same ports every time; what an earlier head knew is forgotten."""
        gcs, dashboard, client = self.ports
        self._start("head", "--head", "--port", gcs, "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard,
                    "--include-dashboard", not self.alone, "--ray-client-server-port", client,
                    "--temp-dir", self.folder / "ray")  # fmt: skip

    def start_second(self) -> None:
        address = re.search(r"address='([\d.]+:\d+)'", (self.folder / "head.log").read_text())[1]
        self._start("second", "--address", address)

    def _start(self, name: str, *options) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "HOME": str(self.folder / "home"), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # see tests/conftest.py
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "180", "TEST_NODE": f"{self.folder}/{name}",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus", 2 if self.alone else 1,
            "--object-store-memory", 100_000_000, "--disable-usage-stats", "--dashboard-agent-listen-port", 0, *options,
        ]  # fmt: skip
        log = self.folder / f"{name}.log"
        for _ in range(4):  # a node gives up after half a minute, which a busy machine may need
            with open(log, "wb") as out:
                code = subprocess.run(
                    [*map(str, command)], env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                ).returncode
            if code == 0 and "Ray runtime started" in log.read_text():
                return
            self.kill(name)
        raise RuntimeError(f"the {name} node did not start: {log.read_text()[-2000:]}")

    def processes(self, name: str) -> list[psutil.Process]:
        """All of a node: what has its mark, and their children, of whom some have written over their environment."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TEST_NODE") == f"{self.folder}/{name}":
                    found |= {process, *process.children(recursive=True)}
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def kill(self, name: str) -> None:
        """Everything at once, as a machine that loses power."""
        while found := self.processes(name):
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=5)

    def close(self) -> None:
        for name in ("second", "head"):
            self.kill(name)
