"""Jobs on Kubernetes against a real API server; the operator's part, and the kubelet's, is played by a thread of the test."""

import http.server
import json
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from support.kubernetes_server import CONTEXT, api_server  # noqa: F401  a fixture
from support.runs import tiny_config

from jobs import submit
from jobs.backends import kubernetes as backend
from jobs.backends.base import State
from unlearn.cli.app import main
from unlearn.errors import ClusterError, ConfigError, MissingExtra

SPACE = "team"
INFRA = Path(__file__).parents[2] / "infra/kubernetes"
IMAGE = "registry.test/unlearn:1"


class Operator(threading.Thread):
    """Walks every RayJob through what KubeRay 1.7 writes into its status, to the end that `ends` names for it (by attempt)."""

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


@pytest.fixture
def first_stage(api_server):  # noqa: F811
    first_stage = FirstStage(api_server)
    yield first_stage
    first_stage.shutdown()
    first_stage.server_close()


@pytest.fixture
def cluster(api_server, first_stage, tmp_path, monkeypatch):  # noqa: F811
    """KUBECONFIG names that server; an operator is at work, and every job is gone afterwards."""
    settings = yaml.safe_load(Path(api_server.kubeconfig).read_text())
    settings["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{first_stage.server_port}"}
    settings["contexts"][0]["context"]["namespace"] = SPACE
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    operator = Operator(api_server)
    operator.start()
    yield operator
    operator.over.set()
    operator.join()
    for job in operator.jobs():
        api_server.delete(job)


@pytest.fixture
def sent(tmp_path):
    """make("a.b=value", ...) -> a request for the small run with two workers; nothing of it is ever trained here."""

    def make(*overrides: str, **options):
        run = tiny_config(
            tmp_path / "run",
            "s3://b/data",
            "s3://b/model",
            "training.engine=deepspeed",
            "cluster.workers=2",
            *overrides,
        )
        return submit.request(run, **options)

    return make


def place(**options) -> backend.Kubernetes:
    return backend.Kubernetes(CONTEXT, **{"overlay": "cpu-demo", "image": IMAGE, "grace": 10} | options)


def until(condition, seconds: float = 15):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    return found


SUCCESS = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def test_what_is_sent(sent, api_server):  # noqa: F811
    """The document of --dry-run is one that the server takes as it is; names of secrets are in it, no values, nor what is forgotten."""
    request = sent("data.forget={ids: [img-001], subjects: [person-1]}", env=["WANDB"])
    text = place(secret=("WANDB=tracking/key",), queue="gpus", priority="unlearn-request").plan(request)
    document = yaml.safe_load(text)
    assert "img-001" in request.config and "img-001" not in text and "person-1" not in text
    labels = document["metadata"]["labels"]
    assert document["metadata"]["namespace"] == "unlearn" and labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert labels["kueue.x-k8s.io/priority-class"] == "unlearn-request"
    spec = document["spec"]
    assert spec["entrypoint"] == f"python -m unlearn run {request.source} --resume"
    for group in (spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]):
        found = {v["name"]: v for v in group["template"]["spec"]["containers"][0]["env"]}
        assert found["WANDB"]["valueFrom"]["secretKeyRef"] == {"name": "tracking", "key": "key"}
        assert found["UNLEARN_REQUIRED_ENV"]["value"] == "WANDB" and found["UNLEARN_JOB"]["value"] == request.id
        assert "UNLEARN_CONFIG" not in found
    assert not api_server.apply(document)
    api_server.delete(document)


def test_as_many_pods_as_the_workers_need(sent):
    def replicas(*overrides):
        return yaml.safe_load(place().plan(sent("training.micro_batch_size=4", *overrides)))["spec"]["rayClusterSpec"][
            "workerGroupSpecs"
        ][0]

    one = replicas("cluster.cpus_per_worker=2")
    assert (one["minReplicas"], one["maxReplicas"]) == (2, 2)
    assert replicas("cluster.workers=2", "cluster.min_workers=1", "cluster.cpus_per_worker=2")["minReplicas"] == 1
    with pytest.raises(ConfigError, match="a worker wants 1 CPUs and 1 GPUs, a worker pod of this template has"):
        replicas("cluster.gpus_per_worker=1")


def test_submit_wait_and_again(cluster, sent, tmp_path, capfd):
    """One job for one request; its metrics make the bar; the exit code is the job's."""
    (tmp_path / "run").mkdir()
    row = {"step": 3, "steps": 4, "images_per_s": 12.0, "retain": 0.5}
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(row) + "\n")
    request = sent()
    path = tmp_path / "run.yaml"
    path.write_text(request.config)
    cluster.ends[request.id] = SUCCESS
    arguments = ["submit", str(path), "--to", f"k8s:{CONTEXT}", "--overlay", "cpu-demo", "--image", IMAGE, "--mounted"]
    for expected in ("submitted: ", "is there already: succeeded"):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--wait"])
        out, err = capfd.readouterr()
        assert stopped.value.code in (0, None), err
        assert out.splitlines()[0] == request.id and expected in err
        assert f"{request.id}: succeeded" in err
    assert [job.id for job in place().jobs()] == [request.id] and len(cluster.jobs()) == 1
    phases = [phase for _, phase in cluster.seen if phase]
    assert phases == ["Initializing", "Running", "Complete"]


def test_states_failure_and_another_attempt(cluster, sent):
    request, here = sent(), place()
    message = "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\nstep 3\nerror: no such shards\n"
    cluster.ends[request.id] = {
        "jobDeploymentStatus": "Failed",
        "jobStatus": "FAILED",
        "reason": "AppFailed",
        "message": message,
    }
    cluster.ends[f"{request.id}-r2"] = {"stays": "Initializing"}
    states = []
    job, new = submit.submit(here, request, mounted=True)
    assert new and job.state in (State.QUEUED, State.STARTING)
    ended = submit.wait(here, request.id, told=lambda job: states.append(job.state), every=0.05)
    assert ended.state == State.FAILED and states[-1] == State.FAILED
    assert ended.message == "AppFailed: error: no such shards: the driver failed, its log says why"
    job, new = submit.submit(here, request, mounted=True)
    assert new and job.state in (State.QUEUED, State.STARTING)
    assert [d["metadata"]["name"] for d in cluster.jobs()] == [request.id, f"{request.id}-r2"]
    assert [job.id for job in here.jobs()] == [request.id]
    other = sent("seed=9")
    with pytest.raises(ClusterError, match="writes there; stop it first, or give another run_dir"):
        submit.submit(here, other, mounted=True)


def test_stop_resume_remove(cluster, sent):
    request, here = sent(), place(secret=("WANDB=tracking/key",))
    submit.submit(here, request, mounted=True)
    until(lambda: here.get(request.id).state == State.RUNNING)
    with pytest.raises(ClusterError, match="is running: stop it first"):
        submit.remove(here, request.id)
    here.stop(request.id)
    assert here.get(request.id).state == State.STOPPED
    assert [p for _, p in cluster.seen if p][-2:] == ["Suspending", "Suspended"]
    cluster.ends[f"{request.id}-r2"] = SUCCESS
    # Whoever resumes need not say again what was said when it was sent.
    assert submit.resume(backend.Kubernetes(CONTEXT), request.id).live
    first, second = sorted(cluster.jobs(), key=lambda job: len(job["metadata"]["name"]))
    assert second["spec"] == {key: value for key, value in first["spec"].items() if key != "suspend"}
    assert (
        backend.STOP not in second["metadata"]["annotations"]
        and first["metadata"]["labels"] == second["metadata"]["labels"]
    )
    until(lambda: here.get(request.id).state == State.SUCCEEDED)
    with pytest.raises(ClusterError, match="has succeeded: there is nothing to resume"):
        submit.resume(here, request.id)
    submit.remove(here, request.id)
    assert here.jobs() == [] and cluster.jobs() == []
    with pytest.raises(ClusterError, match=f"no job {request.id} in namespace {SPACE}"):
        here.get(request.id)


@pytest.mark.parametrize(
    ("status", "state", "message"),
    [
        ({"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded", "message": "waited 600s"}, "failed", "never started: no room"),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "failed", "longer than spec.activeDeadlineSeconds"),
        ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "bad field"}, "failed", "bad field"),
        ({"jobDeploymentStatus": "Retrying", "failed": 1}, "starting", "attempt 1 failed, it is tried again"),
        ({"jobDeploymentStatus": "Waiting"}, "queued", ""),
        ({"jobDeploymentStatus": "Suspended"}, "queued", "suspended"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "stopped", ""),
    ],
)  # fmt: skip
def test_what_the_operator_says(cluster, sent, status, state, message):
    cluster.over.set()
    here = place()
    job = here.start(sent())
    assert job.state == State.QUEUED
    cluster.server.status(cluster.jobs()[0], **status)
    job = here.get(job.id)
    assert job.state == state and message in job.message


def test_a_job_in_a_queue(cluster, sent, api_server):  # noqa: F811
    """Kueue holds it back: the state is queued, with its reason; stopping deactivates its workload."""
    cluster.over.set()
    here, request = place(queue="gpus"), sent()
    here.start(request)
    assert here.get(request.id).live and not cluster.jobs()[0]["spec"].get("suspend")
    assert "no such queue, or Kueue has not looked yet" in here.get(request.id).message
    job = cluster.jobs()[0]
    workload = {
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload",
        "metadata": {"name": "w", "namespace": SPACE, "labels": {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}},
        "spec": {"queueName": "gpus", "podSets": [{"name": "head", "count": 1, "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}]},
    }  # fmt: skip
    # What a slice of an elastic job leaves behind.
    old = {**workload, "metadata": {**workload["metadata"], "name": "older"}}
    api_server.apply(old)
    api_server.status(old, conditions=[{
        "type": "Finished", "status": "True", "reason": "Replaced", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    }])  # fmt: skip
    api_server.apply(workload)
    try:
        why = "couldn't assign flavors to pod set workers: insufficient unused quota for nvidia.com/gpu in flavor h100, 4 more needed"
        api_server.status(workload, conditions=[{
            "type": "QuotaReserved", "status": "False", "reason": "Pending", "message": why, "lastTransitionTime": "2026-01-01T00:00:00Z",
        }])  # fmt: skip
        api_server.status(job, jobDeploymentStatus="Suspended")
        found = here.get(request.id)
        assert found.state == State.QUEUED and found.message == f"waits in Kueue's queue gpus: {why}"
        here.stop(request.id)
        assert api_server.get(workload)["spec"]["active"] is False and here.get(request.id).state == State.STOPPED
        assert api_server.get(old)["spec"].get("active", True)
        assert not api_server.get(job)["spec"].get("suspend")  # that is Kueue's to set
    finally:
        api_server.delete(workload)
        api_server.delete(old)


def test_a_job_of_which_kueue_makes_no_workload_is_stopped_and_leaves_the_queue(cluster, sent, api_server):  # noqa: F811
    """... at once where it is older than Kueue may be slow; and resumed it stands in the queue again."""
    here, request = place(queue="gpus", kueue=2), sent()
    here.start(request)
    until(lambda: here.get(request.id).state == State.RUNNING)  # the operator alone has looked at it
    for _ in range(2):
        began = time.monotonic()
        here.stop(request.id)
        assert here.get(request.id).state == State.STOPPED and time.monotonic() - began < 8
    [job] = cluster.jobs()
    assert job["spec"]["suspend"] and "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]
    submit.resume(here, request.id)
    newest = max(cluster.jobs(), key=lambda job: len(job["metadata"]["name"]))
    assert newest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus" and not newest["spec"].get("suspend")


def test_rayjobs_of_others_with_our_label(cluster, sent, told, api_server):  # noqa: F811
    cluster.over.set()
    here, request = place(), sent()
    here.start(request)
    document = yaml.safe_load(here.plan(request))
    label, annotation = (
        document["metadata"]["labels"][backend.LABEL],
        document["metadata"]["annotations"][backend.REQUEST],
    )
    for number, annotations in enumerate(
        ({}, {backend.REQUEST: "{"}, {backend.REQUEST: "[]"}, {backend.REQUEST: '{"id": "x"}'})
    ):
        meta = {
            "name": f"foreign-{number}",
            "namespace": SPACE,
            "labels": {backend.LABEL: label if number else "theirs"},
            "annotations": annotations,
        }
        api_server.apply(document | {"metadata": meta})
    assert annotation and [job.id for job in here.jobs()] == [request.id]
    code, out, err = told("jobs", "list", "--to", f"k8s:{CONTEXT}")
    assert code == 0 and request.id in out and "foreign" not in out, err
    assert "no job theirs in namespace" in told("jobs", "status", "theirs", "--to", f"k8s:{CONTEXT}")[2]
    submit.remove(here, request.id) if not here.get(request.id).live else here.stop(request.id)
    assert len(cluster.jobs()) == 5


def right(method: str, path: str) -> tuple[str, str, str]:
    """(API group, resource, verb) that a request needs."""
    core, named = (
        re.fullmatch(r"/api/v1/namespaces/[^/]+/(.+)", path),
        re.fullmatch(r"/apis/([^/]+)/[^/]+/namespaces/[^/]+/(.+)", path),
    )
    group, rest = ("", core[1]) if core else (named[1], named[2])
    resource, _, name = rest.partition("/")
    name, _, part = name.partition("/")
    verb = {"GET": "get" if name else "list", "POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]
    return group, f"{resource}/{part}" if part else resource, verb


def test_whoever_submits_has_the_rights_that_it_takes_and_no_more(cluster, sent, first_stage, api_server):  # noqa: F811
    """Every request of a job's life, one in a queue and one that does not start among them, is in the Role, and nothing else is."""
    path = f"/api/v1/namespaces/{SPACE}/pods"
    first_stage.core[path] = pods({"metadata": {"name": "submitter"}, "status": {"phase": "Running"}})
    first_stage.core[f"{path}/submitter/log"] = 200, b"step 4\n"
    here, request = place(queue="gpus", kueue=0), sent()
    cluster.ends[request.id] = {"stays": "Initializing"}
    submit.submit(here, request, mounted=True)
    job = until(lambda: [job for job in cluster.jobs() if job.get("status")])[0]
    workload = {
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload",
        "metadata": {"name": "w", "namespace": SPACE, "labels": {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}},
        "spec": {"queueName": "gpus", "podSets": [{"name": "head", "count": 1, "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}]},
    }  # fmt: skip
    api_server.apply(workload)
    here.get(request.id), "".join(here.logs(request.id, False))
    api_server.call(
        "PATCH", api_server.path(job), {"spec": {"suspend": True}}, kind="application/merge-patch+json"
    )  # Kueue's part
    here.stop(request.id)
    assert here.get(request.id).state == State.STOPPED and api_server.get(workload)["spec"]["active"] is False
    api_server.delete(workload)
    cluster.ends[f"{request.id}-r2"] = SUCCESS
    submit.resume(here, request.id)
    until(lambda: here.get(request.id).state == State.SUCCEEDED)
    submit.remove(here, request.id)
    [role] = [d for d in yaml.safe_load_all((INFRA / "base/accounts.yaml").read_text()) if d["kind"] == "Role"]
    granted = {
        (g, r, v) for rule in role["rules"] for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
    }
    assert {right(*request) for request in first_stage.requests} == granted


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


def test_pods_that_do_not_start(cluster, sent, first_stage):
    request, here = sent(), place()
    quota = 'pods "x" is forbidden: exceeded quota: counts, requested: pods=1, used: pods=300, limited: pods=300'
    conditions = [
        {
            "type": "ReplicaFailure",
            "status": "True",
            "reason": "FailedCreateWorkerPod",
            "message": quota,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ]
    cluster.ends[request.id] = {"stays": "Initializing", "rayClusterStatus": {"conditions": conditions}}
    here.start(request)
    job = until(lambda: (job := here.get(request.id)).message and job)
    assert job.state == State.STARTING and "exceeded quota" in job.message

    other = sent("seed=1", f"run_dir={request.run_dir}2")
    cluster.ends[other.id] = {"stays": "Initializing"}
    held = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{IMAGE}"'}
    first_stage.core[f"/api/v1/namespaces/{SPACE}/pods"] = pods(
        {"metadata": {"name": "head"}, "status": {"phase": "Pending", "containerStatuses": [
            {"name": "ray-head", "image": IMAGE, "imageID": "", "ready": False, "restartCount": 0, "state": {"waiting": held}}]}}
    )  # fmt: skip
    here.start(other)
    job = until(lambda: (job := here.get(other.id)).message and job)
    assert job.message == f'pod head: ImagePullBackOff: Back-off pulling image "{IMAGE}"'


def test_logs(cluster, sent, first_stage):
    request, here = sent(), place()
    cluster.ends[request.id] = SUCCESS
    here.start(request)
    until(lambda: here.get(request.id).state == State.SUCCEEDED)
    path = f"/api/v1/namespaces/{SPACE}/pods"
    first_stage.core[path] = pods()
    with pytest.raises(
        ClusterError,
        match="its pod is gone, or not there yet .the job is succeeded.; wait for it with --follow. Older logs are where",
    ):
        list(here.logs(request.id, False))
    first_stage.core[path] = pods({"metadata": {"name": "submitter"}, "status": {"phase": "Succeeded"}})
    first_stage.core[f"{path}/submitter/log"] = 200, b"training 4/4\nmodel: s3://b/run/model\n"
    assert "".join(here.logs(request.id, True)).startswith("training 4/4\n")
    status = {
        "kind": "Status",
        "code": 403,
        "message": 'pods "submitter" is forbidden: User "me" cannot get resource "pods/log"',
    }
    first_stage.core[f"{path}/submitter/log"] = 403, json.dumps(status).encode()
    with pytest.raises(ClusterError, match="forbids it .*pods/log.*ask for the right in namespace team"):
        list(here.logs(request.id, False))
    first_stage.core[f"{path}/submitter/log"] = (
        404,
        json.dumps(
            {"message": 'pods "submitter" not found', "details": {"name": "submitter", "kind": "pods"}}
        ).encode(),
    )
    with pytest.raises(ClusterError, match="it is not there any more"):
        list(here.logs(request.id, False))
    first_stage.core[path] = pods({"metadata": {"name": "submitter"}, "status": {"phase": "Pending"}})
    with pytest.raises(ClusterError, match="its pod has not started"):
        list(here.logs(request.id, False))


def test_a_log_is_waited_for_and_goes_on_after_a_retry(cluster, sent, first_stage):
    request, here = sent(), place()
    here.start(request)
    path, pieces = f"/api/v1/namespaces/{SPACE}/pods", []
    first_stage.core[path] = pods()
    reader = threading.Thread(target=lambda: pieces.extend(here.logs(request.id, True)), daemon=True)
    reader.start()
    for attempt, text in enumerate((b"error: the first\n", b"step 4\n")):
        first_stage.core[f"{path}/submitter-{attempt}/log"] = 200, text
        found = [{"metadata": {"name": f"submitter-{n}", "creationTimestamp": f"2026-01-01T00:00:0{n}Z"}, "status": {"phase": "Running"}}
                 for n in range(attempt + 1)]  # fmt: skip
        first_stage.core[path] = pods(*found)
        until(lambda attempt=attempt: len(pieces) == attempt + 1)
    cluster.ends[request.id] = SUCCESS
    reader.join(timeout=15)
    assert not reader.is_alive() and "".join(pieces) == "error: the first\nstep 4\n"


def test_refusals_of_the_server(cluster, sent, first_stage, monkeypatch, tmp_path):
    """One message each; those of the real server where it can be made to say them, else its words by way of the first_stage."""
    request, here = sent(), place()
    own = tmp_path / "own.yaml"
    template = backend.rayjob.template("cpu-demo")
    template["spec"]["rayClusterSpec"]["headGroupSpec"]["speed"] = "high"
    own.write_text(yaml.safe_dump(template))
    with pytest.raises(ClusterError, match=r"refuses: .*unknown field .*headGroupSpec.speed"):
        place(overlay=str(own)).start(request)
    assert cluster.jobs() == []
    with pytest.raises(ConfigError, match="is a placeholder, give your own"):
        place(image=None).start(request)

    path = ("POST", f"/apis/ray.io/v1/namespaces/{SPACE}/rayjobs")
    for code, body, message in (
        (
            404,
            {"message": f'namespaces "{SPACE}" not found', "details": {"name": SPACE, "kind": "namespaces"}},
            f"there is no namespace {SPACE}: make it",
        ),
        (
            403,
            {"message": 'rayjobs.ray.io "x" is forbidden: exceeded quota: counts, requested: count/rayjobs.ray.io=1'},
            "quota is used up",
        ),
        (403, {"message": 'rayjobs.ray.io is forbidden: User "me" cannot create'}, "forbids it .*ask for the right"),
    ):
        first_stage.core[path] = code, json.dumps({"kind": "Status", "code": code} | body).encode()
        with pytest.raises(ClusterError, match=message):
            here.start(request)
    del first_stage.core[path]
    monkeypatch.setattr(backend, "RAYJOBS", ("nothing.io", "v1"))
    with pytest.raises(ClusterError, match="this cluster knows no RayJob .*install KubeRay"):
        here.jobs()


def test_clusters_that_cannot_be_reached(cluster, monkeypatch, tmp_path):
    path = tmp_path / "kubeconfig"
    settings = yaml.safe_load(path.read_text())
    with pytest.raises(ConfigError, match=f"no context nowhere in the kubeconfig: {CONTEXT}"):
        backend.Kubernetes("nowhere").jobs()
    path.write_text(yaml.safe_dump(settings | {"users": [{"name": CONTEXT, "user": {"token": "wrong"}}]}))
    with pytest.raises(ClusterError, match="does not know you: the token or certificate of this context is wrong"):
        place().jobs()
    good, file = settings["users"][0]["user"]["token"], tmp_path / "token"
    for user in ({"token": f"{good}\n"}, {"tokenFile": str(file)}):
        file.write_text(f"{good}\n")
        path.write_text(yaml.safe_dump(settings | {"users": [{"name": CONTEXT, "user": user}]}))
        assert place().jobs() == []
        file.write_text("hunter2\nhunter2")
        user = {"token": "hunter2\nhunter2"} if "token" in user else user
        path.write_text(yaml.safe_dump(settings | {"users": [{"name": CONTEXT, "user": user}]}))
        with pytest.raises(
            ClusterError, match="the token of this context holds characters that no header can"
        ) as refused:
            place().jobs()
        assert "hunter2" not in str(refused.value)
    settings["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    path.write_text(yaml.safe_dump(settings))
    began = time.monotonic()
    with pytest.raises(ClusterError, match="no Kubernetes cluster answers at http://127.0.0.1:1"):
        place().jobs()
    assert time.monotonic() - began < 10
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no Kubernetes cluster is configured .*set KUBECONFIG"):
        place().jobs()


def test_options_that_are_wrong():
    with pytest.raises(ConfigError, match="--secret TOKEN: write it as NAME=SECRET/KEY"):
        place(secret=("TOKEN=hunter2",))
    with pytest.raises(ConfigError, match="--queue is for Kubernetes; --to local"):
        submit.backend("local", queue="gpus")
    with pytest.raises(ConfigError, match="no overlay 'tpu'"):
        backend.rayjob.template("tpu")


def test_without_the_kubernetes_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(MissingExtra, match="k8s"):
        place().jobs()
