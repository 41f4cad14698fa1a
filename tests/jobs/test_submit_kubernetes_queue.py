"""Jobs on Kubernetes beside others: in a queue of Kueue, among foreign jobs, and with no more rights than they take."""

import re
from pathlib import Path

import yaml
from support.kubernetes_jobs import SPACE, SUCCESS, place, pods
from support.kubernetes_server import CONTEXT
from support.ray_nodes import until

from jobs import submit
from jobs.backends import kubernetes as backend
from jobs.backends.base import State

INFRA = Path(__file__).parents[2] / "infra/kubernetes"


def workload_of(job: dict) -> dict:
    """What Kueue makes of a job in the queue."""
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload",
        "metadata": {"name": "w", "namespace": SPACE, "labels": {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}},
        "spec": {"queueName": "gpus",
            "podSets": [{"name": "head", "count": 1,
                    "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}]},
    }  # fmt: skip


def test_a_job_in_a_queue(operator, sent, api_server):
    """Kueue holds it back: the state is queued, with its reason; stopping deactivates its workload."""
    operator.over.set()
    here, request = place(queue="gpus"), sent()
    here.start(request)
    assert here.get(request.id).live and not operator.jobs()[0]["spec"].get("suspend")
    assert "no such queue, or Kueue has not looked yet" in here.get(request.id).message
    job = operator.jobs()[0]
    workload = workload_of(job)
    # What a slice of an elastic job leaves behind.
    old = {**workload, "metadata": {**workload["metadata"], "name": "older"}}
    api_server.apply(old)
    api_server.status(old, conditions=[{
        "type": "Finished", "status": "True", "reason": "Replaced", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }])  # fmt: skip
    api_server.apply(workload)
    try:
        why = (
            "couldn't assign flavors to pod set workers: insufficient unused quota for nvidia.com/gpu in flavor "
            "h100, 4 more needed"
        )
        api_server.status(workload, conditions=[{
            "type": "QuotaReserved", "status": "False", "reason": "Pending", "message": why,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
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


def test_a_job_of_which_kueue_makes_no_workload_is_stopped_and_leaves_the_queue(operator, sent, api_server):
    """... at once where it is older than Kueue may be slow; and resumed it stands in the queue again."""
    here, request = place(queue="gpus", kueue=2), sent()
    here.start(request)
    until(lambda: here.get(request.id).state == State.RUNNING)  # the operator alone has looked at it
    for _ in range(2):
        here.stop(request.id)
        assert here.get(request.id).state == State.STOPPED
    [job] = operator.jobs()
    assert job["spec"]["suspend"] and "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]
    submit.resume(here, request.id)
    newest = max(operator.jobs(), key=lambda job: len(job["metadata"]["name"]))
    assert newest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus" and not newest["spec"].get("suspend")


def test_rayjobs_of_others_with_our_label(operator, sent, told, api_server):
    operator.over.set()
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
    assert len(operator.jobs()) == 5


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


def test_whoever_submits_has_the_rights_that_it_takes_and_no_more(operator, sent, first_stage, api_server):
    """Every request of a job's life, one in a queue and one that does not start among them, is in the Role, and nothing
    else is."""
    path = f"/api/v1/namespaces/{SPACE}/pods"
    first_stage.core[path] = pods({"metadata": {"name": "submitter"}, "status": {"phase": "Running"}})
    first_stage.core[f"{path}/submitter/log"] = 200, b"step 4\n"
    here, request = place(queue="gpus", kueue=0), sent()
    operator.ends[request.id] = {"stays": "Initializing"}
    submit.submit(here, request, mounted=True)
    job = until(lambda: [job for job in operator.jobs() if job.get("status")])[0]
    workload = workload_of(job)
    api_server.apply(workload)
    here.get(request.id), "".join(here.logs(request.id, False))
    api_server.call(
        "PATCH", api_server.path(job), {"spec": {"suspend": True}}, kind="application/merge-patch+json"
    )  # Kueue's part
    here.stop(request.id)
    assert here.get(request.id).state == State.STOPPED and api_server.get(workload)["spec"]["active"] is False
    api_server.delete(workload)
    operator.ends[f"{request.id}-r2"] = SUCCESS
    submit.resume(here, request.id)
    until(lambda: here.get(request.id).state == State.SUCCEEDED)
    submit.remove(here, request.id)
    [role] = [d for d in yaml.safe_load_all((INFRA / "base/accounts.yaml").read_text()) if d["kind"] == "Role"]
    granted = {
        (g, r, v) for rule in role["rules"] for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
    }
    assert {right(*request) for request in first_stage.requests} == granted
