"""Kubeflow Pipelines' server: its client with our errors, a token that never stands on a command line, runs, and
watching them."""

import contextlib
import functools
import json
import os
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unlearn import tokens
from unlearn.errors import ClusterError, ConfigError, MissingExtra

if TYPE_CHECKING:
    import kfp

TOKEN = "UNLEARN_KFP_TOKEN"
EXPERIMENT = "unlearn"
PATIENCE = 60  # seconds that a server may be silent while a run is watched
# States of a run or a task that no other follows. kfp's own waiting knows no CANCELED, and would go on for ever.
OVER = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")


def required() -> None:
    """Raise MissingExtra where kfp is not installed."""
    try:
        import kfp  # noqa: F401
    except ImportError:
        raise MissingExtra("kfp", "pipelines", "a pipeline") from None


@dataclass(frozen=True)
class Kubeflow:
    """host: URL of the server. namespace: the user's profile, where Kubeflow has several users, else "". authority: a
    file with the certificates that are trusted, else "". token_file: read anew whenever a request is made, since tokens
    of pods are replaced each hour."""

    host: str
    namespace: str = ""
    token_file: str = ""
    authority: str = ""
    experiment: str = field(default=EXPERIMENT)

    @functools.cached_property
    def client(self) -> "kfp.Client":
        """Raises MissingExtra, ConfigError, ClusterError."""
        required()
        if not self.host.startswith(("http://", "https://")):
            raise ConfigError(f"--host {self.host}: give a URL, as in https://kubeflow.example.com/pipeline")
        if self.authority:
            try:
                ssl.create_default_context(cafile=self.authority)
            except OSError:
                raise ConfigError(f"--ca {self.authority}: no file of certificates in PEM") from None
        source = tokens.source(TOKEN, self.token_file)
        with self.told("reaching it"):
            return _client(self, source)

    @functools.cached_property
    def experiment_id(self) -> str:
        """Of the experiment that our runs belong to; it is made where there is none."""
        client = self.client
        with self.told(f"experiment {self.experiment}"):
            namespace = {"namespace": self.namespace} if self.namespace else {}
            return str(client.create_experiment(self.experiment, **namespace).experiment_id)

    @contextlib.contextmanager
    def told(self, doing: str) -> Iterator[None]:
        """What the server or the network refuses, as a ClusterError. The links that kfp prints are left out."""
        import kfp_server_api
        from urllib3.exceptions import HTTPError, SSLError

        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                yield
        except kfp_server_api.ApiException as e:
            raise _Refused(f"{self.host}: {doing}: {_why(e)}", e.status) from None
        except (HTTPError, TimeoutError, OSError) as e:
            if isinstance(getattr(e, "reason", e), SSLError):
                raise ClusterError(
                    f"{self.host}: {doing}: its certificate is not trusted: give the authority's with --ca"
                ) from None
            raise ClusterError(
                f"{self.host}: {doing}: nobody answers ({type(e).__name__}); is it the URL of Kubeflow Pipelines, and "
                "reachable from here?"
            ) from None
        except ValueError as e:  # how kfp says that an experiment is there twice
            raise ClusterError(f"{self.host}: {doing}: {e}") from None

    def run(self, package: str, parameters: dict, name: str, account: str = "") -> str:
        """Start a run of a compiled pipeline; its id. account: the service account of its pods, else the server's
        choice."""
        client, experiment = self.client, self.experiment_id
        with self.told(f"starting {name}"):
            made = client.run_pipeline(
                experiment, name, package, parameters, enable_caching=False, service_account=account or None
            )
            return str(made.run_id)

    def watch(self, run: str, told: Callable[[str], None], every: float = 5) -> str:
        """Follow a run to its end; its last state. told: called with a line for every change. Raises ClusterError."""
        client, known, misses = self.client, {}, 0
        while True:
            try:
                with self.told(f"run {run}"):
                    found, misses = client.get_run(run), 0
            except ClusterError as e:
                misses += 1
                if getattr(e, "status", None) == 404 or misses * every > PATIENCE:
                    raise
                time.sleep(every)
                continue
            states = {run: found.state} | {
                task.display_name: task.state
                for task in sorted(_tasks(found), key=lambda task: str(task.create_time))
                if task.display_name and task.state
            }
            for name, state in states.items():
                if known.get(name) != state:
                    told(f"{'run ' if name == run else ''}{name}: {(state or 'PENDING').lower()}")
            known = states
            if found.state in OVER:
                return found.state
            time.sleep(every)


class _Refused(ClusterError):
    """status: of HTTP."""

    def __init__(self, text: str, status: int | None):
        super().__init__(text)
        self.status = status


def _tasks(run) -> list:
    return (run.run_details.task_details if run.run_details else None) or []


def _why(e) -> str:
    """What a refusal says, in one line; a token is never part of it."""
    hints = {
        401: f"the token is missing or has expired: set {TOKEN} or {TOKEN}_FILE",
        403: "this user may not do it there; is --namespace the right one?",
    }
    try:
        body = json.loads(e.body or "{}")
        message = body.get("error_message") or body.get("message") or body.get("error") or e.reason
    except (ValueError, AttributeError):
        message = e.reason
    return f"{' '.join(str(message).split())[:500]} ({e.status})" + (
        f"; {hints[e.status]}" if e.status in hints else ""
    )


def _client(server: Kubeflow, source: Callable[[], str] | None) -> "kfp.Client":
    import kfp
    from kfp.client import token_credentials_base

    class Credentials(token_credentials_base.TokenCredentialsBase):
        def refresh_api_key_hook(self, config) -> None:
            if source:
                config.api_key["authorization"] = source()

    class Client(kfp.Client):
        def get_kfp_healthz(self, sleep_duration: int = 0):
            """At once, and as it is: kfp's own tries five times whatever is wrong, and makes a refused token a
            timeout."""
            return self._healthz_api.healthz_service_get_healthz()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that servers of version 1 are not served
        return Client(
            host=server.host, namespace=server.namespace or "kubeflow", credentials=Credentials() if source else None,
            ssl_ca_cert=server.authority or None,
        )  # fmt: skip
