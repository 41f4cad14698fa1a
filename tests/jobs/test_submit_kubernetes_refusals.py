"""Jobs on Kubernetes that do not start, their logs, and what the server or the way to it refuses: one message each."""

import json
import threading

import pytest
import yaml
from support.kubernetes_jobs import IMAGE, SPACE, SUCCESS, place, pods
from support.kubernetes_server import CONTEXT
from support.ray_nodes import until

from jobs.backends import kubernetes as backend
from jobs.backends.base import State
from unlearn.errors import ClusterError, ConfigError


def test_pods_that_do_not_start(operator, sent, first_stage):
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
    operator.ends[request.id] = {"stays": "Initializing", "rayClusterStatus": {"conditions": conditions}}
    here.start(request)
    job = until(lambda: (job := here.get(request.id)).message and job)
    assert job.state == State.STARTING and "exceeded quota" in job.message

    other = sent("seed=1", f"run_dir={request.run_dir}2")
    operator.ends[other.id] = {"stays": "Initializing"}
    held = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{IMAGE}"'}
    first_stage.core[f"/api/v1/namespaces/{SPACE}/pods"] = pods(
        {"metadata": {"name": "head"}, "status": {"phase": "Pending", "containerStatuses": [
            {"name": "ray-head", "image": IMAGE, "imageID": "", "ready": False, "restartCount": 0,
                "state": {"waiting": held}}]}}
    )  # fmt: skip
    here.start(other)
    job = until(lambda: (job := here.get(other.id)).message and job)
    assert job.message == f'pod head: ImagePullBackOff: Back-off pulling image "{IMAGE}"'


def test_logs(operator, sent, first_stage):
    request, here = sent(), place()
    operator.ends[request.id] = SUCCESS
    here.start(request)
    until(lambda: here.get(request.id).state == State.SUCCEEDED)
    path = f"/api/v1/namespaces/{SPACE}/pods"
    first_stage.core[path] = pods()
    with pytest.raises(
        ClusterError,
        match=(
            "its pod is gone, or not there yet .the job is succeeded.; wait for it with --follow. Older logs are where"
        ),
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


def test_a_log_is_waited_for_and_goes_on_after_a_retry(operator, sent, first_stage):
    request, here = sent(), place()
    here.start(request)
    path, pieces = f"/api/v1/namespaces/{SPACE}/pods", []
    first_stage.core[path] = pods()
    reader = threading.Thread(target=lambda: pieces.extend(here.logs(request.id, True)), daemon=True)
    reader.start()
    for attempt, text in enumerate((b"error: the first\n", b"step 4\n")):
        first_stage.core[f"{path}/submitter-{attempt}/log"] = 200, text
        found = [{"metadata": {"name": f"submitter-{n}", "creationTimestamp": f"2026-01-01T00:00:0{n}Z"},
                "status": {"phase": "Running"}}
                 for n in range(attempt + 1)]  # fmt: skip
        first_stage.core[path] = pods(*found)
        until(lambda attempt=attempt: len(pieces) == attempt + 1)
    operator.ends[request.id] = SUCCESS
    reader.join(timeout=600)
    assert not reader.is_alive() and "".join(pieces) == "error: the first\nstep 4\n"


def test_refusals_of_the_server(operator, sent, first_stage, monkeypatch, tmp_path):
    """One message each; those of the real server where it can be made to say them, else its words by way of the
    first_stage."""
    request, here = sent(), place()
    own = tmp_path / "own.yaml"
    template = backend.rayjob.template("cpu-demo")
    template["spec"]["rayClusterSpec"]["headGroupSpec"]["speed"] = "high"
    own.write_text(yaml.safe_dump(template))
    with pytest.raises(ClusterError, match=r"refuses: .*unknown field .*headGroupSpec.speed"):
        place(overlay=str(own)).start(request)
    assert operator.jobs() == []
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


def test_clusters_that_cannot_be_reached(operator, monkeypatch, tmp_path):
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
    with pytest.raises(ClusterError, match="no Kubernetes cluster answers at http://127.0.0.1:1"):
        place().jobs()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no Kubernetes cluster is configured .*set KUBECONFIG"):
        place().jobs()
