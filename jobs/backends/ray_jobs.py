"""Jobs on a Ray cluster that is running, through its Jobs API: `http://HEAD:8265`.

Ray takes an id once only, so a job that is started again is a new submission ID-r2, ID-r3 ...; the newest one counts.
"""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import re
import shlex
import socket
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import yaml

from jobs import token
from jobs.backends.base import CONFIG, GOES_ON, Job, NoSuchJob, Request, State, error_line, is_ours, next_attempt
from jobs.environment import variables
from unlearn.errors import ClusterError, ConfigError, MissingExtra

STATES = {
    "PENDING": State.STARTING,
    "RUNNING": State.RUNNING,
    "SUCCEEDED": State.SUCCEEDED,
    "FAILED": State.FAILED,
    "STOPPED": State.STOPPED,
}
REQUEST, CODE = "unlearn", "unlearn-code"  # our keys in a submission's metadata
GRACE = 30  # seconds that a driver has to end by itself once it is asked to
PATIENCE = 60  # seconds for which a head that has just started may take no jobs yet
HEAD = "/api/v0/nodes?filter_keys=is_head_node&filter_predicates=%3D&filter_values=True"
# Of a working directory only the packages are sent, without what .gitignore names: no results, data or `.env` by
# mistake.
EXCLUDES = ["/*", "!/.", "!/unlearn", "!/jobs", "!/pipelines", "__pycache__", ".env"]


class RayJobs:
    """address: of the dashboard, http or https. working_dir: the folder of code to send, or none where it is
    installed."""

    def __init__(self, address: str, working_dir: str | None = None):
        self.where, self._working_dir, self._connected = address.rstrip("/"), working_dir, None
        if working_dir and not (Path(working_dir) / "jobs").is_dir():
            raise ConfigError(f"--working-dir {working_dir}: no folder `jobs` in it; give the project's root")

    @property
    def remote(self) -> bool:
        return self._remote

    @functools.cached_property
    def _remote(self) -> bool:
        """Whether the head is another machine; a local port may be forwarded to one (ssh -L, kubectl port-forward)."""
        host = urlsplit(self.where).hostname or ""
        with contextlib.suppress(ValueError):
            if not ipaddress.ip_address(host).is_loopback:
                return True
            host = "localhost"
        return host != "localhost" or not self._head_is_here()

    def _head_is_here(self) -> bool:
        """Whether the cluster's own process runs on this machine; also true where nothing answers, which is reported
        later."""
        import psutil

        try:
            session = self._client._do_request("GET", "/api/version").json()["session_name"]
        except Exception:
            return True
        commands = (p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"]))
        return any(f"--session-name={session}" in command and command[0].endswith("gcs_server") for command in commands)

    def ray_version(self) -> str:
        """Of the head. Raises ClusterError."""
        with self._told():
            return self._client._do_request("GET", "/api/version").json()["ray_version"]

    def plan(self, request: Request) -> str:
        return yaml.safe_dump(self._sent(request, request.id), sort_keys=False)

    def _sent(self, request: Request, attempt: str) -> dict:
        variables = request.variables | {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE)}
        code = {"working_dir": self._working_dir, "excludes": EXCLUDES} if self._working_dir else {}
        return {
            "submission_id": attempt, "entrypoint": shlex.join(["python", *request.command]),
            "runtime_env": {"env_vars": variables} | code,
            "metadata": {REQUEST: request.dump(), CODE: self._working_dir or ""},
        }  # fmt: skip

    def again(self, id: str) -> Job:
        details = self._newest(id)
        if (code := details.metadata.get(CODE, "")) and not Path(code).is_dir():
            raise ClusterError(
                f"{id} was sent with the code in {code}, which is not on this machine: submit it again, with "
                "--working-dir"
            )
        variables = (details.runtime_env or {}).get("env_vars", {})
        return RayJobs(self.where, code or None).start(
            Request.load(details.metadata[REQUEST], variables.get(CONFIG, ""))
        )

    def start(self, request: Request) -> Job:
        attempt = next_attempt(request.id, [d.submission_id for d in self._details() if _identity(d) == request.id])
        with self._told():
            self._submit(self._sent(request, attempt))
        return self.get(request.id)

    def _submit(self, sent: dict) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._client.submit_job(**sent)
                return
            except RuntimeError as e:
                # The same request was sent by another process at the same time: the job exists, as intended.
                if "already exists" in str(e):
                    return
                # The head answers before the agent is there that starts jobs.
                if "No available agent" not in str(e) or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def jobs(self) -> list[Job]:
        newest = {}
        for details in self._details():
            newest.setdefault(_identity(details), details)
        return self._known(newest.values())

    def get(self, id: str) -> Job:
        [job] = self._known([self._newest(id)])
        return job

    def _known(self, submissions: Iterable) -> list[Job]:
        """Submissions as jobs. Ray still calls a job running whose driver died with the head's node."""
        jobs = [_job(details) for details in submissions]
        if any(job.live for job in jobs) and self._head_is_lost():
            why = f"the head's node is lost, and the driver with it: start the cluster anew, then {GOES_ON}"
            jobs = [replace(job, state=State.FAILED, message=why) if job.live else job for job in jobs]
        return jobs

    def _head_is_lost(self) -> bool:
        """Whether the node that runs drivers is gone, while the cluster's records can still be asked."""
        try:
            nodes = self._client._do_request("GET", HEAD).json()["data"]["result"]["result"]
            return bool(nodes) and all(node["state"] == "DEAD" for node in nodes)
        except Exception:  # an older Ray; whether it answers at all is checked elsewhere
            return False

    def logs(self, id: str, follow: bool) -> Iterator[str]:
        attempt = self._newest(id).submission_id
        with self._told():
            if not follow:
                yield self._client.get_job_logs(attempt)
                return
            loop = asyncio.new_event_loop()
            pieces = cast(AsyncGenerator[str, None], self._client.tail_job_logs(attempt))  # declared as an iterator
            try:
                with contextlib.suppress(StopAsyncIteration):
                    while True:
                        yield loop.run_until_complete(anext(pieces))
            finally:
                loop.run_until_complete(pieces.aclose())
                loop.close()

    def stop(self, id: str) -> None:
        attempt, deadline = self._newest(id).submission_id, time.monotonic() + GRACE + 15
        with self._told():
            self._client.stop_job(attempt)
        while self.get(id).live and time.monotonic() < deadline:
            time.sleep(0.5)

    def remove(self, id: str) -> None:
        self._newest(id)
        with self._told():
            for details in self._details():
                if _identity(details) == id:
                    self._client.delete_job(details.submission_id)

    def _details(self) -> list:
        """Every submission of ours, the newest first."""
        with self._told():
            submissions = [
                d for d in self._client.list_jobs() if is_ours((d.metadata or {}).get(REQUEST, "")) and d.submission_id
            ]
        return sorted(submissions, key=lambda d: d.start_time or 0, reverse=True)

    def _newest(self, id: str):
        for details in self._details():
            if _identity(details) == id:
                return details
        raise NoSuchJob(f"no job {id} at {self.where}: `unlearn jobs list --to {self.where}` names those there are")

    @property
    def _client(self):
        if self._connected is None:
            _check_answers(self.where)
            try:
                import aiohttp  # noqa: F401  without it Ray's client cannot follow a log
                from ray.job_submission import JobSubmissionClient
            except ImportError:
                raise MissingExtra("Ray's client for jobs", "cluster", "submitting to a Ray cluster") from None
            for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
                logging.getLogger(name).setLevel(logging.WARNING)
            # Ray's client prefers these variables to the address that it is given.
            with variables({"RAY_API_SERVER_ADDRESS": self.where, "RAY_ADDRESS": None}):
                secret = token.read()
                self._connected = JobSubmissionClient(
                    self.where, headers={"Authorization": f"Bearer {secret}"} if secret else None
                )
        return self._connected

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Translate what Ray's client raises into messages for the user."""
        import requests

        try:
            yield
        except (ClusterError, ConfigError, MissingExtra):
            raise
        except requests.exceptions.InvalidHeader:  # its text is the header
            raise ClusterError(
                f"{self.where}: the token holds characters that no header can: check RAY_AUTH_TOKEN"
            ) from None
        except Exception as e:
            text = " ".join(str(e).split())
            if (
                type(e).__name__ == "AuthenticationError"
                or "Invalid response status" in text
                and re.search("40[13]", text)
            ):
                if "Missing" in text or "required" in text or "401" in text:
                    what = (
                        f"{self.where} wants a token, and none was found: set RAY_AUTH_TOKEN, or "
                        "RAY_AUTH_TOKEN_PATH to its file"
                    )
                else:
                    what = (
                        f"{self.where} refuses the token: check RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
                        "~/.ray/auth_token"
                    )
                raise ClusterError(what) from None
            if isinstance(e, ConnectionError | requests.exceptions.RequestException | ValueError):
                raise ClusterError(
                    f"no Ray dashboard answers at {self.where} ({text[:160]}): check the address; the port is 8265 "
                    "unless told"
                ) from None
            if isinstance(e, RuntimeError):
                if "Package" in text and "exceed" in text or "is too large" in text:
                    raise ClusterError(
                        f"the working directory is too large to be sent: {text[:200]}; name a smaller --working-dir"
                    ) from None
                if "No available agent" in text:
                    text = (
                        f"its head has taken no jobs for {PATIENCE} s; is its node alive, and port 52365 free "
                        f"for its agent? ({text[:160]})"
                    )
                raise ClusterError(f"{self.where} refused: {text[:300]}") from None
            raise


def _job(details) -> Job:
    state = STATES[str(getattr(details.status, "value", details.status))]
    request = Request.load(details.metadata[REQUEST])
    return Job(
        request.id,
        state,
        request.run_dir,
        (details.start_time or 0) / 1000,
        _message(details) if state in (State.FAILED, State.STARTING) else "",
    )


def _message(details) -> str:
    text, code = details.message or "", details.driver_exit_code
    if code is None:
        return " ".join(text.split())[:500]
    why = error_line(text.partition("\n")[2])
    if "No module named" in why:
        why += (
            "; the head's `python` lacks it: start Ray with the right one first in PATH, or send our code with "
            "--working-dir"
        )
    return f"exit code {code}: {why}"


def _identity(details) -> str:
    return Request.load(details.metadata[REQUEST]).id


def _check_answers(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--to {address}: write a Ray cluster as http://HEAD:8265")
    try:
        socket.create_connection(
            (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), timeout=10
        ).close()
    except (OSError, ValueError) as e:
        raise ClusterError(
            f"nobody answers at {address} ({getattr(e, 'strerror', None) or e}): check the address, and that the "
            "cluster is up"
        ) from None
