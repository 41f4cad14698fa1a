"""Jobs on Kubernetes: each is a RayJob, which starts a Ray cluster of its own and deletes it at the end (KubeRay,
ray.io/v1).

The RayJob comes from a template (jobs/rayjob.py), and keeps what was sent in an annotation. A job that is started again
is a new RayJob ID-r2, ID-r3 ... with the same label; the newest one counts. Stopping suspends: the nodes are given back
at once, and what is known of the job stays.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import datetime

import yaml

from jobs.backends import base, rayjob
from jobs.backends.base import Job, NoSuchJob, Request, State, is_ours, next_attempt
from jobs.backends.kubernetes_server import NAMESPACE, Server
from jobs.backends.kubernetes_words import STATES, reason, waiting
from jobs.backends.rayjob_rules import QUEUE
from unlearn.errors import ClusterError, ConfigError

LABEL, REQUEST, SENT, STOP = "unlearn.dev/job", "unlearn.dev/request", "unlearn.dev/sent", "unlearn.dev/stopped"
RAYJOBS = ("ray.io", "v1")
WORKLOADS = ("kueue.x-k8s.io", "v1beta2")
KUEUE = 5  # seconds that Kueue may need to make a workload of a job


class Kubernetes:
    """context: of the kubeconfig, none for its current one. overlay, image, queue, priority: of the RayJob; secret:
    NAME=SECRET/KEY."""

    remote = True

    def __init__(
        self, context: str | None = None, overlay: str = "gpu", image: str | None = None, namespace: str | None = None,
        queue: str | None = None, priority: str | None = None, secret: tuple[str, ...] = (), grace: float = 60,
        kueue: float = KUEUE,
    ):  # fmt: skip
        self.where = f"k8s:{context}" if context else "k8s"
        self._overlay, self._image, self._grace = overlay, image, grace
        self._queue, self._priority, self._kueue = queue, priority, kueue
        self._secrets, self._given = dict(map(_secret, secret)), namespace
        self._server = Server(context, namespace, self.where)

    # What is sent

    def plan(self, request: Request) -> str:
        return yaml.safe_dump(self._document(request, request.id, self._given or NAMESPACE), sort_keys=False)

    def _document(self, request: Request, name: str, namespace: str) -> dict:
        template = rayjob.template(self._overlay)
        cluster = base.settings(request).cluster

        def pods(workers: int) -> int:
            return rayjob.pods(template, workers, cluster.cpus_per_worker, cluster.gpus_per_worker)

        most, least = pods(cluster.workers), pods(cluster.min_workers) if cluster.min_workers else None
        document = rayjob.fill(
            template, name=name, entrypoint=["python", *request.command], image=self._image, namespace=namespace,
            queue=self._queue, priority=self._priority,
            workers=(least, most) if least else most, env=request.variables | self._secrets,
            labels={LABEL: request.id}, annotations={REQUEST: request.dump()},
        )  # fmt: skip
        rayjob.check(document)
        return document

    def start(self, request: Request) -> Job:
        return self._send(self._document(request, request.id, self._server.namespace))

    def again(self, id: str) -> Job:
        # Not the live object, which Kueue and the server have changed.
        return self._send(json.loads(self._newest(id)["metadata"]["annotations"][SENT]))

    def _send(self, document: dict) -> Job:
        id = _id(document)
        sent = json.dumps(document)
        document["metadata"]["name"] = next_attempt(id, [d["metadata"]["name"] for d in self._all() if _id(d) == id])
        document["metadata"]["annotations"][SENT] = sent
        with self._server.told(f"sending {document['metadata']['name']}"):
            for rehearsal in ({"dry_run": "All"}, {}):  # the server itself is asked first: every field, every admission
                try:
                    self._server.objects.create_namespaced_custom_object(
                        *RAYJOBS,
                        self._server.namespace,
                        "rayjobs",
                        document,
                        field_manager="unlearn",
                        field_validation="Strict",
                        **rehearsal,
                    )
                except Exception as e:
                    if (
                        getattr(e, "status", None) != 409
                    ):  # another has sent the same at the same time: then it is there
                        raise
        return self.get(id)

    # What is known

    def jobs(self) -> list[Job]:
        newest = {}
        for document in self._all():
            newest.setdefault(_id(document), document)
        return [self._job(document) for document in newest.values()]

    def get(self, id: str) -> Job:
        return self._job(self._newest(id), closely=True)

    def logs(self, id: str, follow: bool) -> Iterator[str]:
        """Of the submitter's pod, which is made when the cluster is ready; a retry of KubeRay has a pod of its own."""
        name, shown_pod = self._newest(id)["metadata"]["name"], None
        where = f"the log of {name}"
        while True:
            job = self.get(id)  # asked before reading, so that the end of the log is read
            with self._server.told(where):
                pods = self._server.core.list_namespaced_pod(
                    self._server.namespace, label_selector=f"job-name={name}"
                ).items
                pod = max(pods, key=lambda p: p.metadata.creation_timestamp, default=None)
                if pod and pod.status.phase != "Pending" and pod.metadata.name != shown_pod:
                    shown_pod = pod.metadata.name
                    answer = self._server.core.read_namespaced_pod_log(
                        shown_pod, self._server.namespace, follow=follow, _preload_content=False
                    )
                    for piece in answer.stream(decode_content=False):
                        yield piece.decode(errors="replace")
            if not follow or not job.live:
                break
            time.sleep(1)
        if shown_pod is None and pod:
            raise ClusterError(
                f"{where}: its pod has not started ({waiting(pod) or 'Pending'}); wait for it with --follow"
            )
        if shown_pod is None:
            raise ClusterError(
                f"{where}: its pod is gone, or not there yet (the job is {job.state}); wait for it with --follow. "
                "Older logs are where the cluster's log shipping takes them (infra/kubernetes/components/logs)"
            )

    # What is asked for

    def stop(self, id: str) -> None:
        document = self._newest(id)
        if not self._job(document).live:
            return
        name, deadline = document["metadata"]["name"], time.monotonic() + self._grace
        patch: dict[str, dict] = {"metadata": {"annotations": {STOP: "true"}}}
        with self._server.told(f"stopping {name}"):
            # Kueue owns `suspend` of what is in its queues, and starts it again: there the workload must be stopped.
            workloads = self._awaited_workloads(document)
            for workload in workloads:
                self._server.objects.patch_namespaced_custom_object(
                    *WORKLOADS,
                    self._server.namespace,
                    "workloads",
                    workload["metadata"]["name"],
                    {"spec": {"active": False}},
                )
            if not workloads:
                patch["spec"] = {"suspend": True}
            self._server.objects.patch_namespaced_custom_object(
                *RAYJOBS, self._server.namespace, "rayjobs", name, patch
            )
            if (
                not workloads
            ):  # out of the queue, or a Kueue that looks at it later starts it; one that forbids this is at work
                with contextlib.suppress(Exception):
                    self._server.objects.patch_namespaced_custom_object(
                        *RAYJOBS, self._server.namespace, "rayjobs", name, {"metadata": {"labels": {QUEUE: None}}}
                    )
        while self.get(id).live and time.monotonic() < deadline:
            time.sleep(0.5)

    def remove(self, id: str) -> None:
        self._newest(id)
        with self._server.told(f"deleting {id}"):
            for document in self._all():
                if _id(document) == id:
                    self._server.objects.delete_namespaced_custom_object(
                        *RAYJOBS,
                        self._server.namespace,
                        "rayjobs",
                        document["metadata"]["name"],
                        propagation_policy="Background",
                    )

    # From documents to jobs

    def _job(self, document: dict, closely: bool = False) -> Job:
        """closely: also look up why a job does not start."""
        meta, status = document["metadata"], document.get("status") or {}
        phase = status.get("jobDeploymentStatus", "")
        state, message = STATES.get(phase, State.RUNNING), reason(status)
        if phase == "Running" and status.get("jobStatus") in (None, "", "PENDING"):
            state = State.STARTING
        elif phase == "Complete" and status.get("jobStatus") == "STOPPED":
            state = State.STOPPED
        elif phase == "Retrying":
            message = (
                f"attempt {status.get('failed', 0)} failed, it is tried again. {message}".strip()
            )  # counted already
        elif meta.get("annotations", {}).get(STOP) and state in (State.QUEUED, State.STARTING, State.RUNNING):
            # Until the cluster is down the run folder may still be written to.
            state, message = (State.STOPPED, "") if phase in ("", "Suspended") else (State.RUNNING, "is being stopped")
        elif phase == "Suspended":
            message = message or "suspended"
        if closely and state in (State.QUEUED, State.STARTING):
            message = self._why(document, state) or message
        created = datetime.fromisoformat(meta["creationTimestamp"]).timestamp()
        request = Request.load(meta["annotations"][REQUEST])
        return Job(request.id, state, request.run_dir, created, " ".join(message.split())[:500])

    def _why(self, document: dict, state: str) -> str:
        """Why a job does not run yet: what Kueue says, what the operator could not create, what its pods wait for."""
        status = document.get("status") or {}
        if state == State.QUEUED and (queue := document["metadata"].get("labels", {}).get(QUEUE)):
            workloads = []
            with contextlib.suppress(Exception):  # not readable by this user; the job's state is reported anyway
                workloads = self._workloads(document)
            conditions = [c for w in workloads for c in w.get("status", {}).get("conditions", [])]
            messages = {
                c["type"]: c.get("message", "")
                for c in conditions
                if c["status"] == "False" or c["type"] in ("Evicted", "Preempted")
            }
            why = next(
                (
                    messages[kind]
                    for kind in ("QuotaReserved", "Admitted", "Preempted", "Evicted")
                    if messages.get(kind)
                ),
                "",
            )
            return f"waits in Kueue's queue {queue}" + (
                f": {why}" if why else "; no such queue, or Kueue has not looked yet"
            )
        for condition in status.get("rayClusterStatus", {}).get("conditions", []):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                return f"pods cannot be made ({condition.get('reason')}): {condition.get('message', '')}"
        if cluster := status.get("rayClusterName"):
            with contextlib.suppress(
                Exception
            ):  # pods may not be readable by this user; the job's state is reported anyway
                pods = self._server.core.list_namespaced_pod(
                    self._server.namespace, label_selector=f"ray.io/cluster={cluster}"
                ).items
                return next(filter(None, map(waiting, pods)), "")
        return ""

    def _workloads(self, document: dict) -> list[dict]:
        """Kueue's records of a job in a queue that are not over, an elastic job's slices; none where no Kueue looks
        after it."""
        if not document["metadata"].get("labels", {}).get(QUEUE):
            return []
        chosen = f"kueue.x-k8s.io/job-uid={document['metadata']['uid']}"
        try:
            workloads = self._server.objects.list_namespaced_custom_object(
                *WORKLOADS, self._server.namespace, "workloads", label_selector=chosen
            )["items"]
        except Exception as e:
            if getattr(e, "status", None) == 404:  # a cluster without Kueue
                return []
            raise
        over = {w["metadata"]["name"] for w in workloads for c in w.get("status", {}).get("conditions", [])
                if (c["type"], c["status"]) == ("Finished", "True")}  # fmt: skip
        return [w for w in workloads if w["metadata"]["name"] not in over]

    def _awaited_workloads(self, document: dict) -> list[dict]:
        """The same; for a job that has just been made they are waited for."""
        age = time.time() - datetime.fromisoformat(document["metadata"]["creationTimestamp"]).timestamp()
        deadline = time.monotonic() + min(self._kueue, self._kueue - age)
        while (
            not (workloads := self._workloads(document))
            and QUEUE in document["metadata"]["labels"]
            and time.monotonic() < deadline
        ):
            time.sleep(0.5)
        return workloads

    # All there is

    def _all(self) -> list[dict]:
        """Every RayJob of ours, the newest first."""
        with self._server.told("listing jobs"):
            documents = self._server.objects.list_namespaced_custom_object(
                *RAYJOBS, self._server.namespace, "rayjobs", label_selector=LABEL
            )["items"]
        documents = [
            d for d in documents if is_ours(d["metadata"].get("annotations", {}).get(REQUEST))
        ]  # others may use the label
        # Two within one second are told apart by their attempt.
        return sorted(
            documents,
            key=lambda d: (d["metadata"]["creationTimestamp"], len(d["metadata"]["name"]), d["metadata"]["name"]),
            reverse=True,
        )

    def _newest(self, id: str) -> dict:
        for document in self._all():
            if _id(document) == id:
                return document
        raise NoSuchJob(
            f"no job {id} in namespace {self._server.namespace}: `unlearn jobs list --to {self.where}` names those "
            "there are"
        )


def _id(document: dict) -> str:
    return document["metadata"]["labels"][LABEL]


def _secret(text: str) -> tuple[str, rayjob.Secret]:
    name, _, rest = text.partition("=")
    secret, _, key = rest.partition("/")
    if not (name and secret and key):
        raise ConfigError(f"--secret {name}: write it as NAME=SECRET/KEY, a Secret of the namespace and a key in it")
    return name, rayjob.Secret(secret, key)
