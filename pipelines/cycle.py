"""The cycle as a Kubeflow pipeline: select -> unlearn -> evaluate -> audit -> judge -> release, or up the ladder, or
give up; then close.

Which rungs there are, whether they are audited, what steps may take and which Secrets they see is fixed when it is
compiled; where the cycle's file lies and where to train are parameters. Every one has a value of its own: Kubeflow's
backend mishandles None, False and "". Nothing is taken from a cache: a step finds by itself what is done, and the
ledger changes between two runs that look the same.
"""

from collections.abc import Callable
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from pipelines.components.audit import audit
from pipelines.components.close import close
from pipelines.components.evaluate import evaluate
from pipelines.components.give_up import give_up
from pipelines.components.judge import judge
from pipelines.components.release import release
from pipelines.components.select import select
from pipelines.components.unlearn import unlearn
from pipelines.place import Place
from pipelines.steps import AUDITED, HERE
from unlearn.cycles.cycle import KEY

NAME = "unlearn-cycle"
CYCLE = "s3://bucket/unlearn/cycle.yaml"  # the default of a package for anybody
TO = "k8s"
KEY_FOLDER = "/etc/unlearn/key"
DAY = 24 * 3600


def pipeline(
    rungs: int = 1, place: Place = Place(), cycle: str = CYCLE, to: str = TO, audited: bool = False
) -> Callable:
    """The pipeline of a cycle with so many rungs. cycle, to: the defaults of its parameters, and a step that trains
    `here` gets what it takes; audited: whether the cycle asks for an audit, without which there is no such step."""
    default_cycle, default_to = cycle, to

    @dsl.pipeline(
        name=NAME,
        description="Serve the deletion requests that have accumulated, and release a model that has forgotten them.",
    )
    def unlearn_cycle(
        cycle: str = default_cycle, to: str = default_to, overlay: str = "gpu", namespace: str = "unlearn",
        priority: str = "unlearn-request",
    ):  # fmt: skip
        """The cycle.

        Args:
            cycle: URI of the CYCLE.yaml.
            to: Where to train; here, k8s (a RayJob) or http://HEAD:8265 (a Ray cluster).
            overlay: Of the RayJob, as `unlearn submit` knows them.
            namespace: Of the RayJob.
            priority: Kueue's priority class of the RayJob.
        """

        def small(
            component: Callable[..., Any], seconds: int = 3600, signs: bool = False, **inputs: Any
        ) -> PipelineTask:
            return _placed(component(**inputs), place, "1", "4Gi", seconds, signs)

        def large(component: Callable[..., Any], seconds: int, **inputs: Any) -> PipelineTask:
            task = _placed(component(**inputs), place, str(place.cpus), place.memory, seconds)
            return task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(place.gpus) if place.gpus else task

        def attempt(id: Any, rung: int) -> None:
            one: dict[str, Any] = {"cycle": cycle, "id": id, "rung": rung}
            where: dict[str, Any] = {
                "to": to,
                "overlay": overlay,
                "image": place.image,
                "namespace": namespace,
                "priority": priority,
            }
            train = large if default_to == HERE else small  # which only follows a job
            trained = train(unlearn, seconds=7 * DAY, **one, **where)
            measured = large(evaluate, seconds=DAY, **one, model=trained.outputs["model"])
            judged = small(judge, **one, metrics=measured.outputs["metrics"])
            if audited:
                judged.after(large(audit, seconds=DAY, **one, model=trained.outputs["model"]).after(measured))
            with dsl.If(judged.outputs["Output"] == "passed", name=f"rung-{rung}-passed"):
                small(release, signs=True, **one, model=trained.outputs["model"])
            with dsl.Else(name=f"rung-{rung}-refused"):
                if rung + 1 < rungs:
                    attempt(id, rung + 1)
                else:
                    small(give_up, cycle=cycle, id=id)

        with dsl.ExitHandler(small(close, cycle=cycle), name="cycle"):
            selected = small(select, signs=True, cycle=cycle, rungs=rungs, audited=AUDITED[audited])
            with dsl.If(selected.outputs["Output"] == "selected", name="requests-to-serve"):
                attempt(selected.outputs["id"], 0)

    return unlearn_cycle


def _placed(
    task: PipelineTask, place: Place, cpus: str, memory: str, seconds: int, signs: bool = False
) -> PipelineTask:  # fmt: skip
    """What every step has: image, resources, retries, secrets, no cache. A limit of memory is what is requested, or a
    neighbour's peak kills; CPU has none, which would only throttle."""
    task.set_container_image(place.image).set_caching_options(False)
    task.set_cpu_request(cpus).set_memory_request(memory).set_memory_limit(memory)
    if place.retries:  # a lost pod, another cycle at work
        task.set_retry(place.retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="600s")
    kubernetes.set_timeout(task, seconds)
    kubernetes.set_security_context(task, run_as_user=1000, run_as_group=1000, run_as_non_root=True)
    for variable, secret, key in place.secrets:
        kubernetes.use_secret_as_env(task, secret, {key: variable})
    if signs and place.key:
        secret, key = place.key
        kubernetes.use_secret_as_volume(task, secret, KEY_FOLDER)
        task.set_env_variable(KEY, f"{KEY_FOLDER}/{key}")
    return task
