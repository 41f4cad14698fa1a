"""Jobs on Kubernetes against a real API server; the operator's part, and the kubelet's, is played by a thread of the
test."""

import json
import sys

import pytest
import yaml
from support.kubernetes_jobs import IMAGE, SPACE, SUCCESS, place
from support.kubernetes_server import CONTEXT
from support.ray_nodes import until

from jobs import submit
from jobs.backends import kubernetes as backend
from jobs.backends.base import State
from unlearn.cli.app import main
from unlearn.errors import ClusterError, ConfigError, MissingExtra


def test_what_is_sent(sent, api_server):
    """The document of --dry-run is one that the server takes as it is; names of secrets are in it, no values, nor what
    is forgotten."""
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


def test_submit_wait_and_again(operator, sent, tmp_path, capfd):
    """One job for one request; its metrics make the bar; the exit code is the job's."""
    (tmp_path / "run").mkdir()
    row = {"step": 3, "steps": 4, "images_per_s": 12.0, "retain": 0.5}
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(row) + "\n")
    request = sent()
    path = tmp_path / "run.yaml"
    path.write_text(request.config)
    operator.ends[request.id] = SUCCESS
    arguments = ["submit", str(path), "--to", f"k8s:{CONTEXT}", "--overlay", "cpu-demo", "--image", IMAGE, "--mounted"]
    for expected in ("submitted: ", "is there already: succeeded"):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--wait"])
        out, err = capfd.readouterr()
        assert stopped.value.code in (0, None), err
        assert out.splitlines()[0] == request.id and expected in err
        assert f"{request.id}: succeeded" in err
    assert [job.id for job in place().jobs()] == [request.id] and len(operator.jobs()) == 1
    phases = [phase for _, phase in operator.seen if phase]
    assert phases == ["Initializing", "Running", "Complete"]


def test_states_failure_and_another_attempt(operator, sent):
    request, here = sent(), place()
    message = (
        "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 "
        "chars):\nstep 3\nerror: no such shards\n"
    )
    operator.ends[request.id] = {
        "jobDeploymentStatus": "Failed",
        "jobStatus": "FAILED",
        "reason": "AppFailed",
        "message": message,
    }
    operator.ends[f"{request.id}-r2"] = {"stays": "Initializing"}
    states = []
    job, new = submit.submit(here, request, mounted=True)
    assert new and job.state in (State.QUEUED, State.STARTING)
    ended = submit.wait(here, request.id, told=lambda job: states.append(job.state), every=0.05)
    assert ended.state == State.FAILED and states[-1] == State.FAILED
    assert ended.message == "AppFailed: error: no such shards: the driver failed, its log says why"
    job, new = submit.submit(here, request, mounted=True)
    assert new and job.state in (State.QUEUED, State.STARTING)
    assert [d["metadata"]["name"] for d in operator.jobs()] == [request.id, f"{request.id}-r2"]
    assert [job.id for job in here.jobs()] == [request.id]
    other = sent("seed=9")
    with pytest.raises(ClusterError, match="writes there; stop it first, or give another run_dir"):
        submit.submit(here, other, mounted=True)


def test_stop_resume_remove(operator, sent):
    request, here = sent(), place(secret=("WANDB=tracking/key",))
    submit.submit(here, request, mounted=True)
    until(lambda: here.get(request.id).state == State.RUNNING)
    with pytest.raises(ClusterError, match="is running: stop it first"):
        submit.remove(here, request.id)
    here.stop(request.id)
    assert here.get(request.id).state == State.STOPPED
    assert [p for _, p in operator.seen if p][-2:] == ["Suspending", "Suspended"]
    operator.ends[f"{request.id}-r2"] = SUCCESS
    # Whoever resumes need not say again what was said when it was sent.
    assert submit.resume(backend.Kubernetes(CONTEXT), request.id).live
    first, second = sorted(operator.jobs(), key=lambda job: len(job["metadata"]["name"]))
    assert second["spec"] == {key: value for key, value in first["spec"].items() if key != "suspend"}
    assert (
        backend.STOP not in second["metadata"]["annotations"]
        and first["metadata"]["labels"] == second["metadata"]["labels"]
    )
    until(lambda: here.get(request.id).state == State.SUCCEEDED)
    with pytest.raises(ClusterError, match="has succeeded: there is nothing to resume"):
        submit.resume(here, request.id)
    submit.remove(here, request.id)
    assert here.jobs() == [] and operator.jobs() == []
    with pytest.raises(ClusterError, match=f"no job {request.id} in namespace {SPACE}"):
        here.get(request.id)


@pytest.mark.parametrize(
    ("status", "state", "message"),
    [
        ({"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded", "message": "waited 600s"}, "failed",
            "never started: no room"),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "failed",
            "longer than spec.activeDeadlineSeconds"),
        ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "bad field"}, "failed",
            "bad field"),
        ({"jobDeploymentStatus": "Retrying", "failed": 1}, "starting", "attempt 1 failed, it is tried again"),
        ({"jobDeploymentStatus": "Waiting"}, "queued", ""),
        ({"jobDeploymentStatus": "Suspended"}, "queued", "suspended"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "stopped", ""),
    ],
)  # fmt: skip
def test_what_the_operator_says(operator, sent, status, state, message):
    operator.over.set()
    here = place()
    job = here.start(sent())
    assert job.state == State.QUEUED
    operator.server.status(operator.jobs()[0], **status)
    job = here.get(job.id)
    assert job.state == state and message in job.message


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
