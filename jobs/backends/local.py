"""Jobs on this machine: detached processes, and a folder for each, closed to other users, with what is known of it.

~/.unlearn/jobs/ID/   request.json  what was asked for      config.yaml  the configuration
                      process.json  pid and its start       log          what the driver printed, of all attempts
                      exit          its exit code           stopped      there once a stop was asked for
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from jobs.backends.base import Job, NoSuchJob, Request, State, error_line, is_ours
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError

# The shell outlives the driver only to write down its exit code; a signal to the group must not end it before.
RECORD = 'trap : INT TERM; exit=$1; shift; "$@"; echo $? > "$exit.part"; mv "$exit.part" "$exit"'


class Local:
    """grace: seconds that a job has to end by itself once it is asked to. home: the folder of all jobs."""

    where, remote = "local", False

    def __init__(self, home: str | None = None, grace: float = 30):
        self.home = Path(home or os.environ.get("UNLEARN_JOBS") or "~/.unlearn/jobs").expanduser().absolute()
        self.grace = grace

    def plan(self, request: Request) -> str:
        sent = {
            "command": [sys.executable, *request.command],
            "environment": request.variables,
            "folder": str(self.home / request.id),
        }
        return yaml.safe_dump(sent, sort_keys=False)

    def start(self, request: Request) -> Job:
        if missing := [name for name in request.env if name not in os.environ]:
            raise ClusterError(f"--env {missing[0]}: this variable is not set here, and the job would need it")
        folder = self.home / request.id
        with self._alone():
            if (folder / "request.json").exists() and self.get(request.id).live:
                return self.get(request.id)
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)
            for name in ("exit", "stopped", "process.json"):
                (folder / name).unlink(missing_ok=True)
            Storage(folder).write("config.yaml", request.config.encode(), private=True)
            _write(folder / "request.json", json.dumps({"request": request.dump(), "submitted": time.time()}))
            _write(folder / "process.json", json.dumps(self._spawn(request, folder)))
        return self.get(request.id)

    def _spawn(self, request: Request, folder: Path) -> dict:
        import jobs

        # From the job's own folder, where no file of the user's can stand for a module of ours.
        path = os.pathsep.join([str(Path(jobs.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = ["/bin/sh", "-c", RECORD, "unlearn-job", str(folder / "exit"), sys.executable, *request.command]
        with open(folder / "log", "ab") as log:
            earlier = log.tell()  # the log of earlier attempts
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | request.variables | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        return {"pid": process.pid, "started": _birth(process.pid), "host": socket.gethostname(), "log": earlier}

    def jobs(self) -> list[Job]:
        all_jobs = [self.get(path.parent.name) for path in self.home.glob("*/request.json") if _request(path)]
        return sorted(all_jobs, key=lambda job: job.submitted or 0, reverse=True)

    def get(self, id: str) -> Job:
        about, folder = self._about(id), self.home / id
        code, process = _text(folder / "exit").strip(), json.loads(_text(folder / "process.json") or "{}")
        stopped = (folder / "stopped").exists()
        if code == "0":
            state, message = State.SUCCEEDED, ""
        elif code and (stopped or code in ("130", "143")):
            state, message = State.STOPPED, ""
        elif code:
            state, message = (
                State.FAILED,
                f"exit code {code}: {error_line(_text(folder / 'log', process.get('log', 0)))}",
            )
        elif process.get("host", socket.gethostname()) != socket.gethostname():
            state, message = State.RUNNING, f"on {process['host']}: only there it can be told whether it still runs"
        elif _alive(process):
            state, message = State.RUNNING, ""
        elif stopped:
            state, message = State.STOPPED, ""
        else:
            state, message = State.FAILED, "it was killed, or this machine was started anew"
        return Job(id, state, Request.load(about["request"]).run_dir, about["submitted"], message)

    def again(self, id: str) -> Job:
        return self.start(Request.load(self._about(id)["request"], _text(self.home / id / "config.yaml")))

    def logs(self, id: str, follow: bool) -> Iterator[str]:
        self._about(id)
        path = self.home / id / "log"
        with open(path, encoding="utf-8", errors="replace") as log:
            while True:
                over = not follow or not self.get(id).live  # asked before reading, so that the end of the log is read
                while piece := log.read(1 << 16):
                    yield piece
                if over:
                    return
                time.sleep(0.3)

    def stop(self, id: str) -> None:
        folder = self.home / id
        if not self.get(id).live:
            return
        (folder / "stopped").touch()
        process = json.loads(_text(folder / "process.json"))
        if process["host"] != socket.gethostname():
            raise ClusterError(f"{id} runs on {process['host']}: stop it there")
        for sign, seconds in ((signal.SIGINT, self.grace), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process["pid"], sign)
            deadline = time.monotonic() + seconds
            while self.get(id).live and time.monotonic() < deadline:
                time.sleep(0.1)
            if not self.get(id).live:
                return

    def remove(self, id: str) -> None:
        self._about(id)
        shutil.rmtree(self.home / id)

    def _about(self, id: str) -> dict:
        about = _request(self.home / id / "request.json") if id and "/" not in id else None
        if about is None:
            raise NoSuchJob(f"no job {id} on this machine: `unlearn jobs list` names those there are")
        return about

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of all who submit on this machine one at a time, so that one request is one job."""
        self.home.mkdir(0o700, parents=True, exist_ok=True)
        with open(self.home / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _request(path: Path) -> dict | None:
    """What `start` wrote; None where there is nothing, or something else."""
    try:
        about = json.loads(_text(path))
        return about if is_ours(about["request"]) and float(about["submitted"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def _birth(pid: int) -> str | None:
    """When a living process began, as a text that no other process of that pid will ever have; None where there is
    none."""
    import psutil

    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists():  # no Linux: by the clock
            return f"{psutil.Process(pid).create_time():.0f}"
        ticks = stat.read_text().rpartition(")")[2].split()[19]  # since the boot, which a changed clock does not move
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{ticks}"
    except (psutil.Error, OSError):
        return None


def _alive(process: dict) -> bool:
    return bool(process.get("started")) and _birth(process["pid"]) == process["started"]


def _text(path: Path, start: int = 0) -> str:
    """What is in the file from byte `start` on; nothing where there is none."""
    try:
        return path.read_bytes()[start:].decode(errors="replace")
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
