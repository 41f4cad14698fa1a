"""The RayJob that a run becomes on Kubernetes: the template of an overlay, filled in.

Pure functions of documents: nothing here reaches a cluster, nor needs the kubernetes package. `check`
(jobs/rayjob_rules.py) says what the cluster would refuse.
"""

import copy
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from jobs.backends.rayjob_rules import ELASTIC, PRIORITY, QUEUE, check
from unlearn.errors import ConfigError

__all__ = ["OVERLAYS", "Secret", "check", "fill", "pods", "template"]

OVERLAYS = ("cpu-demo", "gpu", "gpu-spot")


@dataclass(frozen=True)
class Secret:
    """The value of an environment variable that stays in the cluster: a Secret's name and the key in it."""

    name: str
    key: str


def template(overlay: str) -> dict:
    """The RayJob of an overlay of infra/kubernetes, or of a YAML file that `kubectl kustomize` made of the user's
    own."""
    if overlay in OVERLAYS:
        text = (files("jobs.backends") / f"rendered/{overlay}.yaml").read_text()
    elif overlay.endswith((".yaml", ".yml")):
        try:
            text = Path(overlay).read_text()
        except OSError as e:
            raise ConfigError(
                f"{overlay}: {e.strerror}: name a file that `kubectl kustomize` wrote, or one of {', '.join(OVERLAYS)}"
            ) from None
    else:
        raise ConfigError(f"no overlay {overlay!r}: take one of {', '.join(OVERLAYS)}, or the path of a YAML file")
    try:
        documents = [d for d in yaml.safe_load_all(text) if isinstance(d, dict) and d.get("kind") == "RayJob"]
    except yaml.YAMLError as e:
        raise ConfigError(f"{overlay} is not YAML: {' '.join(str(e).split())}") from None
    if len(documents) != 1:
        raise ConfigError(f"{overlay} holds {len(documents)} RayJobs: exactly one is the template")
    return documents[0]


def fill(
    template: dict, *, name: str, entrypoint: Sequence[str], image: str | None = None, namespace: str | None = None,
    queue: str | None = None, priority: str | None = None, workers: int | tuple[int, int] | None = None,
    resources: Mapping[str, str] | None = None, env: Mapping[str, str | Secret] | None = None,
    labels: Mapping[str, str] | None = None, annotations: Mapping[str, str] | None = None, spec: Mapping | None = None,
) -> dict:  # fmt: skip
    """A copy of the template with these values; what is None stays as the template has it. Not checked: see `check`.

    entrypoint: the command's words, quoted here. queue, priority: of Kueue; queue "" removes the job from Kueue.
    workers: worker pods of the first group, a number, or (least, most). resources: of each worker pod, for example
    {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}. env: for head and workers. spec: further fields of the
    RayJob's spec, for example {"activeDeadlineSeconds": 3600}.
    """
    job = copy.deepcopy(template)
    meta, body = job["metadata"], job["spec"]
    meta["name"] = name
    if namespace:
        meta["namespace"] = namespace
    meta["labels"] = {**meta.get("labels", {}), **(labels or {})}
    meta["annotations"] = {**meta.get("annotations", {}), **(annotations or {})}
    if queue == "":
        for key in (QUEUE, PRIORITY):
            meta["labels"].pop(key, None)
        meta["annotations"].pop(ELASTIC, None)
    elif queue:
        meta["labels"][QUEUE] = queue
    if priority:
        meta["labels"][PRIORITY] = priority
    body["entrypoint"] = shlex.join(entrypoint)
    body.update(spec or {})
    if workers is not None:
        _resize(body["rayClusterSpec"], workers)
    containers = _ray_containers(body)
    if resources:
        # CPU without a limit, as in the templates: a limit would only throttle.
        limits = {kind: amount for kind, amount in resources.items() if kind != "cpu"}
        _workers(body)["template"]["spec"]["containers"][0]["resources"] = {
            "requests": dict(resources),
            "limits": limits,
        }
    for container in containers:
        variables = [e for e in container.get("env", []) if e["name"] not in (env or {})]
        container["env"] = variables + [_variable(key, value) for key, value in (env or {}).items()]
    if image:
        submitter = body.get("submitterPodTemplate")
        for container in containers + ([submitter["spec"]["containers"][0]] if submitter else []):
            container["image"] = image
    return job


def pods(job: dict, workers: int, cpus_per_worker: float, gpus_per_worker: float) -> int:
    """How many worker pods of this RayJob hold so many workers of a run (cluster.workers and its two sizes)."""
    have = _workers(job["spec"])["template"]["spec"]["containers"][0].get("resources", {})
    have = {**have.get("requests", {}), **have.get("limits", {})}
    gpus = sum(int(amount) for kind, amount in have.items() if kind.endswith("/gpu"))
    cpu = str(have.get("cpu", 0))
    # As the operator configures Ray: whole CPUs, rounded up.
    cpus = math.ceil(int(cpu[:-1]) / 1000) if cpu.endswith("m") else math.ceil(float(cpu))
    fit = min(cpus // cpus_per_worker, gpus // gpus_per_worker if gpus_per_worker else math.inf)
    if fit < 1:
        raise ConfigError(
            f"a worker wants {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs, a worker pod of this template has "
            f"{cpus} and {gpus}: lower cluster.cpus_per_worker or gpus_per_worker, or take another template or other "
            "resources"
        )
    return math.ceil(workers / fit)


def _workers(spec: dict) -> dict:
    groups = spec.get("rayClusterSpec", {}).get("workerGroupSpecs")
    if not groups:
        raise ConfigError("the template has no worker group (spec.rayClusterSpec.workerGroupSpecs): take another one")
    return groups[0]


def _resize(cluster: dict, workers: int | tuple[int, int]) -> None:
    group = _workers({"rayClusterSpec": cluster})
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    ceiling = group.get("maxReplicas", most)
    if not 0 <= least <= most:
        raise ConfigError(f"{least} to {most} worker pods are asked for: give 0 <= least <= most")
    if most > ceiling:
        raise ConfigError(
            f"{most} worker pods are asked for, the template allows {ceiling} (maxReplicas): ask for fewer, or raise "
            "it there"
        )
    # The autoscaler grows from the least; without one all are asked for at once, and the run may begin with the least.
    start = least if cluster.get("enableInTreeAutoscaling") else most
    group |= {"minReplicas": least, "maxReplicas": most, "replicas": start}


def _ray_containers(spec: dict) -> list[dict]:
    """The Ray containers of head and workers: each group's first; the others are sidecars."""
    cluster = spec.get("rayClusterSpec", {})
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])] if cluster else []
    return [group["template"]["spec"]["containers"][0] for group in groups]


def _variable(name: str, value: str | Secret) -> dict:
    if isinstance(value, Secret):
        return {"name": name, "valueFrom": {"secretKeyRef": {"name": value.name, "key": value.key}}}
    return {"name": name, "value": value}
