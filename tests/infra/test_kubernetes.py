"""The manifests of infra/kubernetes: valid to the last field, locked down, free of secrets, and rendered as
committed."""

import functools
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.backends import rayjob

FOLDER = Path(__file__).parents[2] / "infra/kubernetes"
RENDERED = Path(__file__).parents[2] / "jobs/backends/rendered"
OVERLAYS = [*rayjob.OVERLAYS, "standing"]
# What the API server's core serves, and kubernetes-validate knows; all else must be a custom resource.
CORE = {"v1", "networking.k8s.io/v1", "policy/v1", "rbac.authorization.k8s.io/v1"}
CUSTOM = {"ray.io/v1", "kueue.x-k8s.io/v1beta2"}


@functools.cache
def documents(overlay: str) -> list[dict]:
    return list(yaml.safe_load_all((RENDERED / f"{overlay}.yaml").read_text()))


def of(overlay: str, kind: str) -> dict:
    """{name: document} of the overlay's objects of a kind."""
    return {d["metadata"]["name"]: d for d in documents(overlay) if d["kind"] == kind}


def cluster(overlay: str) -> dict:
    """The Ray cluster: the RayJob's, or in `standing` one of its own."""
    return (
        of(overlay, "RayCluster")["unlearn"]["spec"]
        if overlay == "standing"
        else of(overlay, "RayJob")["unlearn"]["spec"]["rayClusterSpec"]
    )


def pods(overlay: str) -> dict[str, dict]:
    """Pod templates of head, workers and submitter."""
    found = {"head": cluster(overlay)["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster(overlay)["workerGroupSpecs"]}
    for job in of(overlay, "RayJob").values():
        found["submitter"] = job["spec"]["submitterPodTemplate"]
    return found


def containers(overlay: str) -> dict[str, dict]:
    """Every container that our manifests define, the autoscaler's options with them."""
    found = {f"{role}/{c['name']}": c for role, pod in pods(overlay).items() for c in pod["spec"]["containers"]}
    if "autoscalerOptions" in cluster(overlay):
        found["head/autoscaler"] = cluster(overlay)["autoscalerOptions"]
    return found


def strictly(document: dict) -> None:
    """Validate a core kind: an unknown field is an error."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install 'unlearn[dev]'")
    validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds(overlay):
    seen = {d["apiVersion"] for d in documents(overlay)}
    assert seen <= CORE | CUSTOM and "v1" in seen
    for document in documents(overlay):
        if document["apiVersion"] in CORE:
            strictly(document)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pod_templates_are_pods(overlay):
    """KubeRay's definitions take pods as they are; that their fields are right only the core schema says."""
    for role, pod in pods(overlay).items():
        document = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": role} | pod["metadata"],
            "spec": pod["spec"],
        }
        strictly(document)


def test_the_validation_can_fail():
    pod = json.loads(json.dumps(pods("gpu")["head"]))
    pod["spec"]["containers"][0]["readOnlyRootFileSystem"] = True
    with pytest.raises(Exception, match="readOnlyRootFileSystem"):
        strictly({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "head"}, "spec": pod["spec"]})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_custom_resources_on_a_real_server(overlay, api_server):
    for document in documents(overlay):
        if document["apiVersion"] in CUSTOM:
            assert api_server.apply(document) == [], document["kind"]


def test_the_server_can_refuse(api_server):
    from kubernetes.client import ApiException

    wrong = json.loads(json.dumps(of("gpu", "RayJob")["unlearn"]))
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(ApiException, match="rayStartParam: field not declared in schema"):
        api_server.apply(wrong)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_keep_to_the_restricted_standard(overlay):
    for name, container in containers(overlay).items():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]} and "privileged" not in context, name
    for role, pod in pods(overlay).items():
        spec = pod["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == context["fsGroup"] == 1000, role
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, role
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), role
        assert all(set(volume) - {"name"} <= {"emptyDir", "configMap"} for volume in spec["volumes"]), role
        # What Ray, its jobs and the caches write to; the root file system is read-only.
        mounted = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        home = next(v["value"] for v in spec["containers"][0]["env"] if v["name"] == "HOME")
        assert {"/tmp", home} <= mounted and (role == "submitter" or "/tmp/ray" in mounted), role
    labels = of(overlay, "Namespace")["unlearn"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_says_what_it_needs(overlay):
    for name, container in containers(overlay).items():
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests) and limits["memory"] == requests["memory"], name
        assert all(limits[kind] == amount for kind, amount in requests.items() if "/" in kind), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_accounts_have_no_more_than_they_need(overlay):
    accounts = of(overlay, "ServiceAccount")
    assert all(a["automountServiceAccountToken"] is False for a in accounts.values())
    for role, pod in pods(overlay).items():
        assert pod["spec"]["serviceAccountName"] in accounts, role
        # The autoscaler's container talks to the API server; nobody else.
        wants = role == "head" and bool(cluster(overlay).get("enableInTreeAutoscaling"))
        assert pod["spec"]["automountServiceAccountToken"] is wants, role
    assert not {d["kind"] for d in documents(overlay)} & {"ClusterRole", "ClusterRoleBinding", "Secret"}
    # One role, of whoever submits; what is in it: test_submit_kubernetes.py.
    [role], [binding] = of(overlay, "Role").values(), of(overlay, "RoleBinding").values()
    assert binding["roleRef"]["name"] == role["metadata"]["name"] and {s["kind"] for s in binding["subjects"]} == {
        "Group"
    }
    assert "*" not in str(role["rules"]) and "secrets" not in str(role["rules"])


SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|(?=[A-Za-z+]*[0-9])[A-Za-z0-9+]{40,}|(?i:password|token|secret)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{8,}"
)


@pytest.mark.parametrize(
    "path", sorted(p for p in FOLDER.rglob("*") if p.is_file()), ids=lambda p: str(p.relative_to(FOLDER))
)
def test_no_secret_in_any_file(path):
    found = [line for line in path.read_text().splitlines() if SECRETS.search(line)]
    assert found == []


@pytest.mark.parametrize(
    "line", ["key: AKIAABCDEFGHIJKLMNOP", "password: correcthorse", "value: 0123456789abcdef0123456789abcdef01234567"]
)
def test_a_secret_would_be_seen(line):
    assert SECRETS.search(line)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_value_of_a_secret_variable(overlay):
    for name, container in containers(overlay).items():
        for variable in container.get("env", []):
            words = set(variable["name"].upper().split("_"))
            assert not ("value" in variable and words & {"SECRET", "TOKEN", "PASSWORD", "KEY"}), (
                f"{name}: {variable['name']}"
            )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policies_select_the_pods_there_are(overlay):
    """A policy whose labels no pod has would isolate nothing, and a port nobody opens would let nobody in."""
    policies, everyone = of(overlay, "NetworkPolicy"), pods(overlay)
    assert policies["nothing-by-default"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ray = policies["ray-nodes"]["spec"]
    assert ray["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}  # set by the operator
    opened = {port["port"] for rule in ray["ingress"] for port in rule.get("ports", [])}
    ports = {
        port["containerPort"]
        for pod in everyone.values()
        for c in pod["spec"]["containers"]
        for port in c.get("ports", [])
    }
    assert opened == {8265, 8080} and opened <= ports
    assert all(
        pod["metadata"]["annotations"]["prometheus.io/port"] == "8080"
        for role, pod in everyone.items()
        if role != "submitter"
    )
    if "submitter" in everyone:
        assert (
            policies["submitter"]["spec"]["podSelector"]["matchLabels"].items()
            <= everyone["submitter"]["metadata"]["labels"].items()
        )
    blocked = [
        block["ipBlock"]["except"]
        for rule in ray["egress"]
        for block in rule.get("to", [])
        if "except" in block.get("ipBlock", {})
    ]
    assert ["169.254.169.254/32"] in blocked  # the node's own credentials


@pytest.mark.parametrize("overlay", ["gpu", "gpu-spot", "standing"])
def test_placement_and_quota(overlay):
    """The head stands on demand and off the GPUs; the queue covers every resource, and holds one gang of each kind."""
    head, workers = pods(overlay)["head"]["spec"], pods(overlay)["workers"]["spec"]
    kind = "spot" if overlay == "gpu-spot" else "on-demand"
    assert head["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"} and "tolerations" not in head
    assert workers["nodeSelector"] == {"karpenter.sh/capacity-type": kind, "nvidia.com/gpu.present": "true"}
    assert cluster(overlay)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    flavours = of(overlay, "ResourceFlavor")
    flavour = "unlearn-gpu-spot" if kind == "spot" else "unlearn-gpu"
    assert flavours[flavour]["spec"]["nodeLabels"] == workers["nodeSelector"]
    assert flavours["unlearn-cpu"]["spec"]["nodeLabels"] == head["nodeSelector"]
    for taint in flavours[flavour]["spec"]["nodeTaints"]:
        assert any(t["key"] == taint["key"] and t["operator"] == "Exists" for t in workers["tolerations"])
    [resources] = of(overlay, "ClusterQueue")["unlearn"]["spec"]["resourceGroups"]
    quota = {f["name"]: {r["name"]: r["nominalQuota"] for r in f["resources"]} for f in resources["flavors"]}
    assert set(quota) == set(flavours)
    for role, pod in pods(overlay).items():
        asked: dict[str, float] = {}
        for container in pod["spec"]["containers"]:
            for resource, amount in container["resources"]["requests"].items():
                asked[resource] = asked.get(resource, 0) + quantity(amount)
        assert set(asked) <= set(resources["coveredResources"])
        count = cluster(overlay)["workerGroupSpecs"][0]["replicas"] if role == "workers" else 1
        have = quota[flavour if role == "workers" else "unlearn-cpu"]
        assert all(amount * count <= quantity(have[resource]) for resource, amount in asked.items()), (role, asked)


def quantity(amount) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(amount)).groups()
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("overlay", ["gpu", "gpu-spot"])
def test_queue_and_priority_exist(overlay):
    labels = of(overlay, "RayJob")["unlearn"]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] in of(overlay, "LocalQueue")
    assert labels["kueue.x-k8s.io/priority-class"] in of(overlay, "WorkloadPriorityClass")
    [queue] = of(overlay, "LocalQueue").values()
    assert queue["spec"]["clusterQueue"] in of(overlay, "ClusterQueue")


def test_object_stores_fit_into_shared_memory():
    for overlay in OVERLAYS:
        for group in (cluster(overlay)["headGroupSpec"], *cluster(overlay)["workerGroupSpecs"]):
            memory = quantity(group["template"]["spec"]["containers"][0]["resources"]["requests"]["memory"])
            assert int(group["rayStartParams"]["object-store-memory"]) < memory / 4


def test_a_spot_worker_drains_with_a_command_that_ray_has():
    from ray.scripts import scripts

    worker = pods("gpu-spot")["workers"]["spec"]
    shell, flag, script = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("/bin/sh", "-c")
    drain, sleep = script.split(";")
    words = shlex.split(drain)
    assert words[:2] == ["ray", "drain-node"] and "\n" not in script.strip()
    # Parsed by Ray itself, up to where it looks for a cluster.
    context = scripts.drain_node.make_context("drain-node", words[2:])
    assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    deadline = context.params["deadline_remaining_seconds"]
    assert int(sleep.split()[1]) <= deadline < worker["terminationGracePeriodSeconds"]
    assert "lifecycle" not in pods("gpu-spot")["head"]["spec"]["containers"][0]


def test_the_dashboard_asks_for_metrics_that_ray_has():
    import ray

    text = json.loads(of("gpu", "ConfigMap")["unlearn-dashboard"]["data"]["dashboard.json"])
    expressions = " ".join(t["expr"] for panel in text["panels"] for t in panel["targets"])
    names = set(re.findall(r"\bray_([a-z_]+)\{", expressions))
    assert len(names) >= 8
    sources = [
        *Path(ray.__file__).parent.glob("dashboard/modules/reporter/reporter_agent.py"),
        *Path(ray.__file__).parent.glob("train/v2/_internal/metrics/*.py"),
    ]
    known = " ".join(path.read_text() for path in sources)
    assert {name for name in names if f'"{name}"' not in known} == set()


def test_what_the_log_sidecar_reads_is_mounted():
    config = yaml.safe_load(of("gpu", "ConfigMap")["unlearn-fluent-bit"]["data"]["fluent-bit.yaml"])
    paths = config["pipeline"]["inputs"][0]["path"].split(",")
    for role in ("head", "workers"):
        spec = pods("gpu")[role]["spec"]
        ray, sidecar = spec["containers"]
        [shared] = {m["name"] for m in ray["volumeMounts"]} & {m["name"] for m in sidecar["volumeMounts"]}
        place = next(m for m in sidecar["volumeMounts"] if m["name"] == shared)
        assert place["readOnly"] and all(
            path.startswith(place["mountPath"] + "/session_latest/logs/") for path in paths
        )
        assert place["mountPath"] == next(m["mountPath"] for m in ray["volumeMounts"] if m["name"] == shared)
        folder = next(m["mountPath"] for m in sidecar["volumeMounts"] if m["name"] == "fluent-bit")
        assert sidecar["args"] == ["-c", f"{folder}/fluent-bit.yaml"]


def test_ray_version_is_the_one_installed():
    import ray

    assert {cluster(overlay)["rayVersion"] for overlay in OVERLAYS} == {ray.__version__}


needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")


@needs_kubectl
def test_rendered_files_are_up_to_date(tmp_path):
    subprocess.run(["bash", str(FOLDER / "render.sh"), str(tmp_path)], check=True)
    for path in tmp_path.iterdir():
        assert path.read_text() == (RENDERED / path.name).read_text(), (
            f"{path.name} is stale: bash infra/kubernetes/render.sh"
        )
    assert (
        {p.name for p in tmp_path.iterdir()} == {p.name for p in RENDERED.iterdir()} == {f"{o}.yaml" for o in OVERLAYS}
    )


@needs_kubectl
@pytest.mark.parametrize("component", ["efa", "tls", "podmonitor", "irsa", "cycle"])
def test_components_that_no_overlay_has(component, tmp_path, request):
    """As a user adds them, in an overlay of one's own with another image."""
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    mine = tmp_path / "kubernetes/overlays/mine"
    mine.mkdir()
    tree = {"resources": ["../gpu"], "components": [f"../../components/{component}"],
            "images": [{"name": "ghcr.io/example/unlearn", "newName": "registry.example.com/unlearn",
                    "newTag": "0.1.0"}]}  # fmt: skip
    if component == "cycle":
        tree["transformers"] = ["../../components/cycle/image"]
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(tree))
    made = tmp_path / "mine.yaml"
    made.write_text(
        subprocess.run(["kubectl", "kustomize", str(mine)], check=True, capture_output=True, text=True).stdout
    )
    filled = rayjob.fill(
        rayjob.template(str(made)), name="run-7", entrypoint=["python", "-m", "unlearn", "run", "s3://bucket/run.yaml"]
    )
    rayjob.check(filled)  # no placeholder is left
    if component == "cycle":
        job = next(d for d in yaml.safe_load_all(made.read_text()) if d["kind"] == "CronJob")
        [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        told = next(variable["value"] for variable in container["env"] if variable["name"] == "IMAGE")
        assert told == container["image"] == "registry.example.com/unlearn:0.1.0", "named once, in `images`"
    if component == "efa":
        asked = set(
            filled["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"][
                "requests"
            ]
        )
        queue = next(d for d in yaml.safe_load_all(made.read_text()) if d["kind"] == "ClusterQueue")
        assert asked <= set(queue["spec"]["resourceGroups"][0]["coveredResources"])
    server = request.getfixturevalue("api_server")
    for document in yaml.safe_load_all(made.read_text()):
        if document["apiVersion"] in CUSTOM:
            assert server.apply(document) == []
