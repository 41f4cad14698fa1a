"""What a cluster would refuse of a RayJob, said before it is sent.

The API server accepts more than those behind it: KubeRay's operator parks such a job in ValidationFailed, Kueue's
webhook turns it away, and a resource nobody has makes it wait for ever. Rules of KubeRay 1.7, Kueue 0.19, and a few of
our own. Not here: what the API server says itself (unknown fields, types), and what hangs on the operator's feature
gates (tlsOptions, networkPolicy).
"""

import re
from collections.abc import Iterator

import yaml

from unlearn.errors import ConfigError

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"  # labels
ELASTIC = "kueue.x-k8s.io/elastic-job"  # annotation
MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
LONGEST_NAME = 47  # the operator adds a suffix for the cluster, and Kubernetes one for its pods
POD_SETS = 18  # of a Workload: the head, the submitter, and a worker group each
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
TLS = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
SECRET = {"SECRET", "TOKEN", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS", "KEY", "APIKEY"}
HARMLESS = {"FILE", "PATH", "DIR"}  # a place where a secret is


def check(rayjob: dict) -> None:
    """Raises ConfigError with the first thing that KubeRay's operator or Kueue would refuse."""
    for problem in problems(rayjob):
        raise ConfigError(f"RayJob {rayjob.get('metadata', {}).get('name')}: {problem}")


def problems(rayjob: dict) -> Iterator[str]:
    """All of it, as sentences that say what to do."""
    meta, spec = rayjob.get("metadata", {}), rayjob.get("spec", {})
    cluster = spec.get("rayClusterSpec")
    yield from _name(meta.get("name", ""))
    yield from _modes(spec, bool(spec.get("clusterSelector")))
    yield from _life(spec, cluster or {})
    if not cluster and not spec.get("clusterSelector"):
        yield "give one of spec.rayClusterSpec and spec.clusterSelector"
    elif cluster and spec.get("clusterSelector"):
        yield "give only one of spec.rayClusterSpec and spec.clusterSelector"
    if cluster:
        head, workers = cluster.get("headGroupSpec", {}), cluster.get("workerGroupSpecs", [])
        groups = [("the head", head), *((f"worker group {w.get('groupName')}", w) for w in workers)]
        bare = [where for where, group in groups if not _containers(group)]
        for where in bare:
            yield f"{where} has no container: give template.spec.containers"
        if not bare:
            yield from _groups(cluster, groups)
            yield from _autoscaling(cluster, groups)
            yield from _state(cluster, meta.get("annotations") or {})
            yield from _trust(cluster)
    if (meta.get("labels") or {}).get(QUEUE):
        yield from _kueue(spec, cluster, (meta.get("annotations") or {}).get(ELASTIC) == "true")
    yield from _ours(spec, cluster or {})


def _name(name: str) -> Iterator[str]:
    if len(name) > LONGEST_NAME:
        yield f"the name has {len(name)} characters: {LONGEST_NAME} at most"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "a name is made of a-z, 0-9 and -, begins with a letter and does not end with -"


def _modes(spec: dict, selects: bool) -> Iterator[str]:
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit") or 0
    if mode not in MODES:
        yield f"spec.submissionMode {mode!r}: one of {', '.join(MODES)}"
    if retries < 0:
        yield f"spec.backoffLimit is {retries}: 0 or more"
    if mode == "InteractiveMode" and retries:
        yield "spec.backoffLimit does not go with InteractiveMode: set it to 0"
    if mode == "SidecarMode":
        if spec.get("submitterPodTemplate") or spec.get("submitterConfig"):
            yield "SidecarMode has no submitter: leave out spec.submitterPodTemplate and submitterConfig"
        if _pod((spec.get("rayClusterSpec") or {}).get("headGroupSpec", {})).get("restartPolicy", "Never") != "Never":
            yield "SidecarMode wants the head's restartPolicy to be Never"
    if selects:
        if not spec["clusterSelector"].get("ray.io/cluster"):
            yield "spec.clusterSelector names no cluster: give ray.io/cluster"
        if retries:
            yield "spec.backoffLimit does not go with clusterSelector, since a retry is a new cluster: set it to 0"
        if spec.get("suspend"):
            yield "spec.suspend does not go with clusterSelector"
        if mode == "SidecarMode":
            yield "SidecarMode does not go with clusterSelector: take K8sJobMode"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "spec.runtimeEnvYAML is no YAML mapping"


def _life(spec: dict, cluster: dict) -> Iterator[str]:
    shutdown, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished") or 0
    if ttl < 0:
        yield f"spec.ttlSecondsAfterFinished is {ttl}: 0 or more"
    if ttl > 0 and not shutdown:
        yield "spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and not shutdown:
        yield "spec.suspend needs shutdownAfterJobFinishes: true"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key) is not None and spec[key] <= 0:
            yield f"spec.{key} is {spec[key]}: more than 0, or leave it out"
    deletion = spec.get("deletionStrategy") or {}
    rules = deletion.get("deletionRules") or []
    policies = [r.get("policy") for r in rules] + [
        (deletion.get(k) or {}).get("policy") for k in ("onSuccess", "onFailure")
    ]
    if rules and shutdown:
        yield "spec.deletionStrategy.deletionRules does not go with shutdownAfterJobFinishes: leave one out"
    if not rules and shutdown and "DeleteNone" in policies:
        yield "spec.deletionStrategy says DeleteNone and shutdownAfterJobFinishes says delete: leave one out"
    if "DeleteWorkers" in policies and cluster.get("enableInTreeAutoscaling"):
        yield "spec.deletionStrategy: DeleteWorkers does not go with enableInTreeAutoscaling, take DeleteCluster"


def _groups(cluster: dict, groups: list[tuple[str, dict]]) -> Iterator[str]:
    scales = cluster.get("enableInTreeAutoscaling")
    if cluster.get("upgradeStrategy"):
        yield "rayClusterSpec.upgradeStrategy is not for the cluster of a job: leave it out"
    for where, group in groups:
        params = group.get("rayStartParams") or {}
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & {
            k for k, v in params.items() if v
        }:
            yield f"{where} has resources both in rayStartParams and in resources: keep one"
        if "labels" in params:
            yield f"{where}: rayStartParams.labels is not supported, use the group's labels"
        for key, value in (group.get("labels") or {}).items():
            if not re.fullmatch(r"([A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?)?", value) or not re.fullmatch(
                r"([-.a-z0-9]{1,253}/)?[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?", key
            ):
                yield f"{where}: {key}={value} is no Kubernetes label"
    for where, group in groups[1:]:
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if not scales and (least is None or most is None):
            yield f"{where}: without an autoscaler give both minReplicas and maxReplicas"
        least, most = least or 0, 2**31 - 1 if most is None else most
        if min(least, most, group.get("replicas", 0)) < 0:
            yield f"{where}: replicas, minReplicas and maxReplicas are 0 or more"
        elif (
            not least <= group.get("replicas", least) <= most
        ):  # the operator would take the nearer bound and say nothing
            yield (
                f"{where}: replicas {group.get('replicas', least)} is not between minReplicas {least} and "
                f"maxReplicas {most}"
            )


def _autoscaling(cluster: dict, groups: list[tuple[str, dict]]) -> Iterator[str]:
    options, scales = cluster.get("autoscalerOptions") or {}, cluster.get("enableInTreeAutoscaling")
    version = _value(cluster["headGroupSpec"], AUTOSCALER_V2)
    second = options.get("version") == "v2" or version in ("1", "true")
    if version in ("1", "true") and not scales:
        yield f"the head's {AUTOSCALER_V2} needs enableInTreeAutoscaling: true"
    if scales and version is not None and options.get("version"):
        yield f"autoscalerOptions.version and the head's {AUTOSCALER_V2} are both set: keep the first"
    if (options.get("idleTimeoutSeconds") or 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is less than 0"
    for where, group in groups:
        if scales and second and _pod(group).get("restartPolicy", "Never") != "Never":
            yield f"{where}: autoscaler v2 wants restartPolicy Never"
        if scales and group.get("suspend"):
            yield f"{where}: suspend does not go with enableInTreeAutoscaling"
        for key in ("idleTimeoutSeconds", "priority"):
            if group.get(key) and not (scales and second):
                yield f"{where}: {key} needs autoscaler v2 (autoscalerOptions.version: v2)"


def _state(cluster: dict, annotations: dict) -> Iterator[str]:
    head, options, params = (
        cluster["headGroupSpec"],
        cluster.get("gcsFaultToleranceOptions"),
        cluster["headGroupSpec"].get("rayStartParams") or {},
    )
    by_annotation = annotations.get("ray.io/ft-enabled")
    if options and by_annotation:
        yield "the annotation ray.io/ft-enabled and gcsFaultToleranceOptions are both set: keep the second"
    if not options and by_annotation != "true" and _variable(head, "RAY_REDIS_ADDRESS"):
        yield "the head's RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions: give redisAddress there"
    if options and (
        params.get("redis-password") or _variable(head, "REDIS_PASSWORD") or _variable(head, "RAY_REDIS_ADDRESS")
    ):
        yield (
            "with gcsFaultToleranceOptions Redis' address and password stand there, not in the head's environment "
            "or rayStartParams"
        )
    if params.get("redis-username") or _variable(head, "REDIS_USERNAME"):
        yield "Redis' user name stands in gcsFaultToleranceOptions.redisUsername"


def _trust(cluster: dict) -> Iterator[str]:
    auth, version = cluster.get("authOptions") or {}, str(cluster.get("rayVersion") or "")
    if auth.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth is not for jobs: leave it out"
    if auth.get("mode") == "token":
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if not numbers or (int(numbers[1]), int(numbers[2])) < (2, 52):
            yield f"authOptions.mode token needs rayVersion 2.52.0 or newer, not {version or 'none'}"
    if (cluster.get("tlsOptions") or {}).get("enabled"):
        for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
            for name in TLS:
                if _variable(group, name):
                    yield f"{name} is the operator's to set where tlsOptions is on: leave it out"


def _kueue(spec: dict, cluster: dict | None, elastic: bool) -> Iterator[str]:
    if not cluster:
        yield f"a job in a queue ({QUEUE}) brings its own cluster: give spec.rayClusterSpec"
        return
    if not spec.get("shutdownAfterJobFinishes"):
        yield f"a job in a queue ({QUEUE}) gives its nodes back: set spec.shutdownAfterJobFinishes: true"
    if cluster.get("enableInTreeAutoscaling") and not elastic:
        yield f'a job in a queue may use enableInTreeAutoscaling only with the annotation {ELASTIC}: "true"'
    workers = cluster.get("workerGroupSpecs", [])
    room = POD_SETS - 1 - (spec.get("submissionMode", "K8sJobMode") == "K8sJobMode")
    if len(workers) > room:
        yield f"{len(workers)} worker groups, Kueue counts {room} at most"
    for name in {w.get("groupName", "").lower() for w in workers} & {"head", "submitter"}:
        yield f"a worker group is called {name}, by which Kueue means another pod: rename it"


def _ours(spec: dict, cluster: dict) -> Iterator[str]:
    entrypoint = (spec.get("entrypoint") or "").strip()
    if not entrypoint or "CONFIG" in entrypoint.split():
        yield (
            "spec.entrypoint is the template's: give the command, for example python -m unlearn run "
            "s3://bucket/run.yaml"
        )
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])] if cluster.get("headGroupSpec") else []
    for group in [*groups, {"template": spec.get("submitterPodTemplate") or {}}]:
        for container in _containers(group):
            image = container.get("image", "")
            if image == "unlearn" or image.startswith("ghcr.io/example/"):
                yield f"container {container.get('name')}: the image {image} is a placeholder, give your own"
            for variable in container.get("env", []):
                words = set(variable["name"].upper().split("_"))
                if variable.get("value") and words & SECRET and not words & HARMLESS:
                    yield (
                        f"{variable['name']} stands in the job as plain text, for everyone to read: put it into a "
                        "Secret and name that"
                    )


def _pod(group: dict) -> dict:
    return (group.get("template") or {}).get("spec") or {}


def _containers(group: dict) -> list[dict]:
    return _pod(group).get("containers") or []


def _variable(group: dict, name: str) -> dict | None:
    """The environment variable of the group's Ray container, its first."""
    return next((v for v in _containers(group)[0].get("env", []) if v["name"] == name), None)


def _value(group: dict, name: str) -> str | None:
    variable = _variable(group, name)
    return variable.get("value", "") if variable else None
