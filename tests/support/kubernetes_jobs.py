"""What stands in for a cluster around a real API server: KubeRay's part, the kubelet's, and places to send jobs to."""

import http.server
import json
import threading
import urllib.error
import urllib.request

from jobs.backends import kubernetes as backend
from support.kubernetes_server import CONTEXT

SPACE = "team"
IMAGE = "registry.test/unlearn:1"
SUCCESS = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


class Operator(threading.Thread):
    """Walks every RayJob through what KubeRay 1.7 writes into its status, to the end that `ends` names for it (by
    attempt)."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.over, self.ends, self.seen = server, threading.Event(), {}, []

    def run(self):
        while not self.over.wait(0.02):
            for job in self.jobs():
                status = job.get("status", {})
                for values in self.next(job, status.get("jobDeploymentStatus", ""), status):
                    self.server.status(job, **values)
                    self.seen.append((job["metadata"]["name"], values.get("jobDeploymentStatus")))

    def jobs(self) -> list[dict]:
        return self.server.call("GET", f"/apis/ray.io/v1/namespaces/{SPACE}/rayjobs")[0]["items"]

    def next(self, job: dict, phase: str, status: dict):
        name, suspend = job["metadata"]["name"], job["spec"].get("suspend")
        end = self.ends.get(name, {})
        if suspend and phase in ("Initializing", "Running"):
            yield {"jobDeploymentStatus": "Suspending"}
        elif suspend and phase == "Suspending":
            yield {"jobDeploymentStatus": "Suspended", "rayClusterName": "", "jobStatus": ""}
        elif suspend and phase == "":
            yield {"jobDeploymentStatus": "Suspended"}
        elif phase == "" and not suspend:
            yield {"jobDeploymentStatus": "Initializing", "jobId": f"{name}-x", "rayClusterName": f"{name}-c"}
        elif phase == "Initializing" and end.get("stays") != "Initializing":
            yield {"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}
        elif phase == "Running" and status.get("jobStatus") == "PENDING":
            yield {"jobStatus": "RUNNING"}
        elif phase == "Running" and "jobDeploymentStatus" in end:
            yield end
        elif phase == "Initializing" and "rayClusterStatus" in end and "rayClusterStatus" not in status:
            yield {"rayClusterStatus": end["rayClusterStatus"]}


class FirstStage(http.server.ThreadingHTTPServer):
    """Before the API server: answers for core kinds, which it does not have, from `core`, and passes the rest on."""

    def __init__(self, server):
        self.core: dict[str, tuple[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path) of each
        first_stage = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.partition("?")[0]
                first_stage.requests.append((self.command, path))
                if (self.command, path) in first_stage.core or path in first_stage.core:
                    code, body = first_stage.core.get((self.command, path)) or first_stage.core[path]
                    return self.answer(code, body)
                length = int(self.headers.get("Content-Length") or 0)
                sent = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "accept-encoding")}
                request = urllib.request.Request(
                    server.url + self.path, self.rfile.read(length) if length else None, sent, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, context=first_stage.trust) as answer:
                        self.answer(answer.status, answer.read())
                except urllib.error.HTTPError as e:
                    self.answer(e.code, e.read())

            do_POST = do_PATCH = do_DELETE = do_GET

            def answer(self, code: int, body: bytes):
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        import ssl

        self.trust = ssl.create_default_context(cafile=server.certificate)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def pods(*found: dict) -> tuple[int, bytes]:
    items = [
        {
            "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"} | pod["metadata"],
            "spec": {"containers": []},
            "status": pod["status"],
        }
        for pod in found
    ]
    return 200, json.dumps({"kind": "PodList", "apiVersion": "v1", "items": items}).encode()


def place(**options) -> backend.Kubernetes:
    return backend.Kubernetes(CONTEXT, **{"overlay": "cpu-demo", "image": IMAGE, "grace": 10} | options)
