"""The RayJob of a run: filled as asked, and every rule that the cluster would refuse it by."""

import ast
import copy
import functools
import inspect
import shlex

import pytest
import yaml

from jobs.backends import rayjob, rayjob_rules
from jobs.backends.rayjob import Secret, check, fill, pods
from unlearn.errors import ConfigError

template = functools.cache(rayjob.template)  # reading YAML is slow

COMMAND = ["python", "-m", "unlearn", "run", "s3://bucket/run.yaml", "--resume"]
IMAGE = "registry.example.com/unlearn:0.1.0"


def job(overlay: str = "gpu", **values) -> dict:
    return fill(template(overlay), **({"name": "run-7", "entrypoint": COMMAND, "image": IMAGE} | values))


@pytest.mark.parametrize("overlay", rayjob.OVERLAYS)
def test_a_filled_template_has_no_problem(overlay):
    assert list(rayjob_rules.problems(job(overlay))) == []


@pytest.mark.parametrize("overlay", rayjob.OVERLAYS)
def test_a_template_cannot_be_sent_as_it_is(overlay):
    with pytest.raises(ConfigError, match="placeholder|the template's"):
        check(template(overlay))


def test_fill_leaves_the_template_alone_and_sets_what_is_asked():
    before = copy.deepcopy(template("gpu"))
    filled = fill(
        before, name="run-7", entrypoint=["python", "-m", "jobs.sweep", "a b", "$HOME"], image=IMAGE, namespace="team",
        queue="theirs",
        priority="unlearn-request", workers=3, resources={"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"},
        env={"AWS_REGION": "eu-west-1", "HF_TOKEN": Secret("hub", "token"), "HOME": "/elsewhere"},
        labels={"unlearn/run": "7"}, annotations={"note": "x"}, spec={"activeDeadlineSeconds": 60},
    )  # fmt: skip
    assert before == template("gpu")
    meta, spec = filled["metadata"], filled["spec"]
    assert (meta["name"], meta["namespace"], meta["annotations"]) == ("run-7", "team", {"note": "x"})
    assert meta["labels"]["kueue.x-k8s.io/queue-name"] == "theirs" and meta["labels"]["unlearn/run"] == "7"
    assert meta["labels"]["kueue.x-k8s.io/priority-class"] == "unlearn-request"
    assert (
        shlex.split(spec["entrypoint"]) == ["python", "-m", "jobs.sweep", "a b", "$HOME"]
        and spec["activeDeadlineSeconds"] == 60
    )
    head, [group] = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[k] for k in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    for one in (head, group):
        ray, sidecar = one["template"]["spec"]["containers"]
        env = {e["name"]: e for e in ray["env"]}
        assert ray["image"] == IMAGE and sidecar["image"].startswith("fluent/") and len(env) == len(ray["env"])
        assert env["AWS_REGION"]["value"] == "eu-west-1" and env["HOME"]["value"] == "/elsewhere"
        assert env["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert group["template"]["spec"]["containers"][0]["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "1"},
    }  # fmt: skip
    submitter = spec["submitterPodTemplate"]["spec"]["containers"][0]
    assert submitter["image"] == IMAGE and "AWS_REGION" not in str(submitter["env"])
    check(filled)


def test_no_queue_means_none_of_kueue():
    filled = job("gpu-spot", queue="")
    assert "kueue" not in str(filled["metadata"])
    check(filled)


@pytest.mark.parametrize(
    ("overlay", "workers", "expected"),
    [("gpu-spot", (2, 4), (2, 2, 4)), ("gpu", (2, 4), (4, 2, 4)), ("cpu-demo", 2, (2, 2, 2))],
)
def test_workers(overlay, workers, expected):
    group = job(overlay, workers=workers)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert tuple(group[k] for k in ("replicas", "minReplicas", "maxReplicas")) == expected


@pytest.mark.parametrize(("workers", "message"), [(9, "allows 8"), ((3, 2), "least <= most"), ((2, 9), "allows 8")])
def test_workers_beyond_the_template(workers, message):
    with pytest.raises(ConfigError, match=message):
        job("gpu", workers=workers)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "resources", "expected"),
    [(16, 8, 1, None, 2), (17, 8, 1, None, 3), (8, 20, 1, None, 2), (4, 1, 0, {"cpu": "1500m", "memory": "4Gi"}, 2)],
)
def test_pods(workers, cpus, gpus, resources, expected):
    assert pods(job("gpu", resources=resources), workers, cpus, gpus) == expected


def test_a_worker_too_large_for_a_pod():
    with pytest.raises(ConfigError, match="a worker pod of this template has 80 and 8"):
        pods(job("gpu"), 1, 1, 9)


def test_template_of_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump_all([{"kind": "Namespace"}, template("gpu")]))
    assert rayjob.template(str(path)) == template("gpu")
    path.write_text("kind: Namespace\n")
    with pytest.raises(ConfigError, match="0 RayJobs"):
        rayjob.template(str(path))
    path.write_text("a: [\n")
    with pytest.raises(ConfigError, match="not YAML"):
        rayjob.template(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        rayjob.template(str(tmp_path / "other.yaml"))
    with pytest.raises(ConfigError, match="cpu-demo, gpu, gpu-spot"):
        rayjob.template("gpus")


def edit(document: dict, path: str, value) -> None:
    """Set a/b/0/c, a JSON pointer; value None: remove it."""
    *parents, last = [key.replace("~1", "/") for key in path.split("/")]
    for key in parents:
        document = document[int(key)] if isinstance(document, list) else document.setdefault(key, {})
    last = int(last) if isinstance(document, list) else last
    if value is None:
        del document[last]
    else:
        document[last] = value


SPEC, CLUSTER, HEAD, WORKERS = (
    "spec",
    "spec/rayClusterSpec",
    "spec/rayClusterSpec/headGroupSpec",
    "spec/rayClusterSpec/workerGroupSpecs/0",
)
POD, CONTAINER = "template/spec", "template/spec/containers/0"
QUEUED = "metadata/labels/kueue.x-k8s.io~1queue-name"
SELECTS = {CLUSTER: None, QUEUED: None, f"{SPEC}/clusterSelector": {"ray.io/cluster": "a"}, f"{SPEC}/backoffLimit": 0}
PLAIN = {QUEUED: None}  # without a queue, so that it is the operator that refuses
SCALES = {**PLAIN, f"{CLUSTER}/enableInTreeAutoscaling": True}
RULES = f"{SPEC}/deletionStrategy"
DELETE = {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED"}}
REDIS = {f"{CLUSTER}/gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}}


def variable(name: str, value: str = "1", group: str = HEAD) -> dict:
    return {f"{group}/{CONTAINER}/env": [{"name": name, "value": value}]}


def group(name: str) -> dict:
    return copy.deepcopy(job()["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]) | {"groupName": name}


BROKEN = [
    ({"metadata/name": "a" * 48}, "48 characters: 47 at most"),
    ({"metadata/name": "7-runs"}, "begins with a letter"),
    ({"metadata/name": "run_7"}, "a-z, 0-9 and -"),
    ({"metadata/name": "run-"}, "does not end with -"),
    ({f"{SPEC}/submissionMode": "Nope"}, "submissionMode 'Nope'"),
    ({f"{SPEC}/backoffLimit": -1}, "backoffLimit is -1"),
    ({f"{SPEC}/submissionMode": "InteractiveMode"}, "does not go with InteractiveMode"),
    ({f"{SPEC}/submissionMode": "SidecarMode"}, "SidecarMode has no submitter"),
    ({f"{SPEC}/submissionMode": "SidecarMode", f"{SPEC}/submitterPodTemplate": None, f"{SPEC}/submitterConfig": None,
      f"{HEAD}/{POD}/restartPolicy": "Always"}, "SidecarMode wants the head's restartPolicy"),
    ({**SELECTS, f"{SPEC}/clusterSelector": {"cluster": "a"}}, "names no cluster"),
    ({**SELECTS, f"{SPEC}/backoffLimit": 1}, "a retry is a new cluster"),
    ({**SELECTS, f"{SPEC}/suspend": True}, "suspend does not go with clusterSelector"),
    ({**SELECTS, f"{SPEC}/submissionMode": "SidecarMode", f"{SPEC}/submitterPodTemplate": None,
            f"{SPEC}/submitterConfig": None},
     "SidecarMode does not go with clusterSelector"),
    ({f"{SPEC}/runtimeEnvYAML": "pip: ["}, "no YAML mapping"),
    ({f"{SPEC}/runtimeEnvYAML": "- pip"}, "no YAML mapping"),
    ({f"{SPEC}/ttlSecondsAfterFinished": -1}, "ttlSecondsAfterFinished is -1"),
    ({**PLAIN, f"{SPEC}/shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
    ({**PLAIN, f"{SPEC}/shutdownAfterJobFinishes": None, f"{SPEC}/ttlSecondsAfterFinished": 0, f"{SPEC}/suspend": True},
     "suspend needs shutdownAfterJobFinishes"),
    ({f"{SPEC}/activeDeadlineSeconds": 0}, "activeDeadlineSeconds is 0"),
    ({f"{SPEC}/preRunningDeadlineSeconds": -5}, "preRunningDeadlineSeconds is -5"),
    ({RULES: {"deletionRules": [DELETE]}}, "deletionRules does not go with shutdownAfterJobFinishes"),
    ({RULES: {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteCluster"}}}, "says DeleteNone"),
    ({**SCALES, RULES: {"onSuccess": {"policy": "DeleteWorkers"}, "onFailure": {"policy": "DeleteCluster"}}},
        "take DeleteCluster"),
    ({**PLAIN, CLUSTER: None}, "give one of spec.rayClusterSpec"),
    ({**PLAIN, f"{SPEC}/clusterSelector": {"ray.io/cluster": "a"}, f"{SPEC}/backoffLimit": 0}, "give only one of"),
    ({f"{HEAD}/{POD}/containers": []}, "the head has no container"),
    ({f"{WORKERS}/{POD}/containers": []}, "worker group workers has no container"),
    ({f"{CLUSTER}/upgradeStrategy": {"type": "Recreate"}}, "upgradeStrategy"),
    ({f"{HEAD}/resources": {"CPU": "4"}}, "the head has resources both in"),
    ({f"{HEAD}/rayStartParams/labels": "a=b"}, "rayStartParams.labels"),
    ({f"{WORKERS}/labels": {"zone": "a b"}}, "zone=a b is no Kubernetes label"),
    ({f"{WORKERS}/labels": {"a b": "zone"}}, "a b=zone is no Kubernetes label"),
    ({f"{WORKERS}/minReplicas": None}, "give both minReplicas and maxReplicas"),
    ({f"{WORKERS}/minReplicas": -1}, "0 or more"),
    ({f"{WORKERS}/minReplicas": 9}, "replicas 2 is not between minReplicas 9 and maxReplicas 8"),
    ({f"{WORKERS}/replicas": 9}, "replicas 9 is not between"),
    ({**PLAIN, **variable("RAY_enable_autoscaler_v2")}, "needs enableInTreeAutoscaling: true"),
    ({**SCALES, **variable("RAY_enable_autoscaler_v2"), f"{CLUSTER}/autoscalerOptions": {"version": "v2"}},
        "both set: keep the first"),
    ({**SCALES, f"{CLUSTER}/autoscalerOptions": {"idleTimeoutSeconds": -1}}, "less than 0"),
    ({**SCALES, f"{CLUSTER}/autoscalerOptions": {"version": "v2"}, f"{WORKERS}/{POD}/restartPolicy": "Always"},
        "v2 wants restartPolicy Never"),
    ({**SCALES, f"{WORKERS}/suspend": True}, "suspend does not go with enableInTreeAutoscaling"),
    ({f"{WORKERS}/idleTimeoutSeconds": 60}, "idleTimeoutSeconds needs autoscaler v2"),
    ({f"{WORKERS}/priority": 1}, "priority needs autoscaler v2"),
    ({**REDIS, "metadata/annotations": {"ray.io/ft-enabled": "true"}}, "keep the second"),
    (variable("RAY_REDIS_ADDRESS"), "needs gcsFaultToleranceOptions"),
    ({**REDIS, **variable("REDIS_PASSWORD")}, "stand there"),
    ({**REDIS, f"{HEAD}/rayStartParams/redis-password": "x"}, "stand there"),
    (variable("REDIS_USERNAME"), "redisUsername"),
    ({f"{CLUSTER}/authOptions": {"enableK8sTokenAuth": True}}, "not for jobs"),
    ({f"{CLUSTER}/rayVersion": "2.51.0"}, "2.52.0 or newer, not 2.51.0"),
    ({f"{CLUSTER}/rayVersion": None}, "2.52.0 or newer, not none"),
    ({f"{CLUSTER}/tlsOptions": {"enabled": True}, **variable("RAY_USE_TLS", group=WORKERS)}, "the operator's to set"),
    ({**SELECTS, QUEUED: "unlearn"}, "brings its own cluster"),
    ({f"{SPEC}/shutdownAfterJobFinishes": None, f"{SPEC}/ttlSecondsAfterFinished": 0}, "gives its nodes back"),
    ({f"{CLUSTER}/enableInTreeAutoscaling": True}, "only with the annotation kueue.x-k8s.io/elastic-job"),
    ({f"{CLUSTER}/workerGroupSpecs": [group(f"g{n}") for n in range(17)]}, "17 worker groups, Kueue counts 16"),
    ({f"{WORKERS}/groupName": "Head"}, "called head"),
    ({f"{WORKERS}/groupName": "submitter"}, "called submitter"),
    ({f"{SPEC}/entrypoint": " "}, "give the command"),
    ({f"{SPEC}/entrypoint": "python -m unlearn run CONFIG"}, "give the command"),
    ({f"{WORKERS}/{CONTAINER}/image": "ghcr.io/example/unlearn:VERSION"}, "ray-worker: the image"),
    (variable("AWS_SECRET_ACCESS_KEY"), "plain text"),
    (variable("hf_token", group=WORKERS), "plain text"),
]  # fmt: skip


def break_it(change: dict) -> dict:
    broken = job()
    for path, value in change.items():
        edit(broken, path, value)
    return broken


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_what_is_refused(change, message):
    broken = break_it(change)
    with pytest.raises(ConfigError) as refused:
        check(broken)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"RayJob {broken['metadata']['name']}: ") and "\n" not in str(refused.value)


def test_every_rule_is_broken_above():
    """A rule is a `yield` of a sentence in the module; each of them must have spoken."""
    tree = ast.parse(inspect.getsource(rayjob_rules))
    rules = {
        line: node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Yield)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    spoken = set()
    for change, _ in BROKEN:
        found = rayjob_rules.problems(break_it(change))
        for _ in found:
            inner = found
            while inner.gi_yieldfrom:
                inner = inner.gi_yieldfrom
            spoken.add(rules[inner.gi_frame.f_lineno])
    assert set(rules.values()) - spoken == set()


def test_the_api_server_itself_would_take_most_of_them(api_server):
    """Why `check` is needed: strict validation by the real server lets these pass."""
    taken = 0
    for change, _ in BROKEN:
        broken = break_it(change)
        try:
            api_server.apply(broken)
            taken += 1
        except Exception as e:
            assert type(e).__name__ == "ApiException", e
    assert taken > len(BROKEN) / 2
