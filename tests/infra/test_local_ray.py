"""infra/local: a Ray cluster with a token on this machine, started, used through the Jobs API, stopped."""

import contextlib
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from support.programs import free_ports, program

from jobs.cluster import WORKER_ENV

INFRA = Path(__file__).parents[2] / "infra"
JOB = """
import os, ray, unlearn.cli
ray.init()
@ray.remote
def seen():
    return os.environ["MALLOC_MMAP_THRESHOLD_"]
have = ray.cluster_resources()
from jobs.rendezvous import torch_config
most = min(4 * 2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 10)
small = have["object_store_memory"] <= 1.01 * most
folder = torch_config("gloo").folder
print("SEEN", ray.get(seen.remote()), os.environ["GLOO_SOCKET_IFNAME"], folder, have["CPU"], small)
"""
CLIENT = """
import sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
job = client.submit_job(entrypoint=sys.argv[2])
while not client.get_job_status(job).is_terminal():
    time.sleep(0.2)
print(client.get_job_status(job), client.get_job_logs(job))
"""


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def marked(mark: str) -> list[psutil.Process]:
    """The living processes whose environment says that start.sh of this folder started them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("UNLEARN_RAY", "").endswith(mark) and lives(process):
                found.append(process)
    return found


@pytest.fixture
def local_ray(tmp_path):
    """(run(script, *options) -> CompletedProcess, home, temporary): the scripts of infra/local in a HOME of their
    own."""
    if not importlib.util.find_spec("aiohttp_cors"):
        pytest.skip("ray[default] is not installed: no Jobs API")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RAY_TMPDIR": temporary, "PYTHON": sys.executable}

        def run(script: str, *options: str) -> subprocess.CompletedProcess:
            return subprocess.run(
                [INFRA / "local" / script, *options], env=env, capture_output=True, text=True, timeout=600
            )

        try:
            yield run, tmp_path, temporary
        finally:
            run("stop.sh")


def test_a_local_cluster_takes_jobs_from_who_has_the_token_and_stops_whole(local_ray):
    run, home, temporary = local_ray
    port, dashboard, *others = map(str, free_ports(8))
    names = ["ray-client-server-port", "dashboard-agent-grpc-port", "metrics-export-port",
             "runtime-env-agent-port", "node-manager-port", "object-manager-port"]  # fmt: skip
    options = [f"--{name}={value}" for name, value in zip(names, others, strict=True)]
    start = ["--port", port, "--dashboard-port", dashboard, *options, "--num-cpus=1"]
    url, token = f"http://127.0.0.1:{dashboard}", home / ".unlearn/ray/token"
    bystander = subprocess.Popen(["sleep", "7200"])
    try:
        started = run("start.sh", *start)
        assert started.returncode == 0, started.stderr
        assert f"RAY_AUTH_TOKEN_PATH={token}" in started.stdout and f"--to {url}" in started.stdout
        assert token.stat().st_mode & 0o777 == 0o600
        ours = marked(str(token.parent))
        assert ours
        again = run("start.sh", *start)
        assert (again.returncode, again.stdout[:16]) == (0, "Ray runs already")

        def answer(headers: dict) -> int:
            try:
                return urllib.request.urlopen(
                    urllib.request.Request(f"{url}/api/jobs/", headers=headers), timeout=600
                ).status
            except urllib.error.HTTPError as e:
                return e.code

        secret = token.read_text().strip()
        assert answer({}) == 401
        assert answer({"Authorization": f"Bearer {secret[::-1]}"}) == 403
        assert answer({"Authorization": f"Bearer {secret}"}) == 200

        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        entrypoint = shlex.join(["python", "-c", JOB])  # as `unlearn submit` sends it
        job = subprocess.run(
            [sys.executable, "-c", CLIENT, url, entrypoint], env=env, capture_output=True, text=True, timeout=600
        )
        assert "SUCCEEDED" in job.stdout, job.stdout + job.stderr
        private = Path(temporary, f"unlearn-ray-{os.getuid()}")
        assert f"SEEN {WORKER_ENV['MALLOC_MMAP_THRESHOLD_']} lo {private} 1.0 True" in job.stdout
        assert private.stat().st_mode & 0o777 == 0o700 and (private / "ray/session_latest").exists()

        ours, listening, shown = marked(str(token.parent)), set(), ""
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
                listening |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
                shown += " ".join(process.cmdline())
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
        assert shown and secret not in shown + started.stdout + started.stderr
        logs = "".join(f.read_text() for f in token.parent.glob("*.log"))
        assert secret not in logs

        assert run("stop.sh").stdout == "stopped\n"
        psutil.wait_procs(ours, timeout=600)  # the last of them may still be on its way out
        assert not marked(str(token.parent)) and not any(map(lives, ours))
        assert bystander.poll() is None
        assert run("stop.sh").stdout.startswith("nothing of infra/local")
    finally:
        bystander.kill()


def test_a_port_in_use_is_told_at_once(local_ray):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        started = local_ray[0]("start.sh", "--dashboard-port", str(port))
    assert started.returncode == 2 and f"port {port} is in use" in started.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "10500"],
            "port 10500 is one of those that Ray's workers take (10001 to 19999): choose another with --port"),
        (["--port=19999"], "port 19999 is one of those"),
        (["--dashboard-port", "10001"], "port 10001 is one of those"),
        (["--port", "7001", "--min-worker-port", "7000", "--max-worker-port=7100"],
            "port 7001 is one of those that Ray's workers take (7000 to 7100)"),
        (["--port", "70000"], "70000 is no port"),
        (["--port", "a[$(touch x)]"], "is no port"),
    ],
)  # fmt: skip
def test_a_port_that_cannot_be_had_is_told_at_once(local_ray, options, message):
    started = local_ray[0]("start.sh", *options)
    assert started.returncode == 2 and message in started.stderr


def test_joining_without_the_token_is_refused(local_ray):
    run, home, _ = local_ray
    joined = run("start.sh", "--join", "127.0.0.1:1")
    assert joined.returncode == 2 and f"no token in {home / '.unlearn/ray/token'}" in joined.stderr


def test_shellcheck_has_nothing_to_say_of_the_scripts():
    scripts = [str(p) for p in (INFRA / "local").glob("*.sh")]
    found = subprocess.run([program("shellcheck"), "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
