"""Training of a step as a job on a Ray cluster: submitted or found again, its log followed as the step's own.

The job gets the run's configuration alone, by way of the run folder. The ledger and the key that signs stay with the
steps.
"""

import json
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from typing import Any

import yaml

from jobs import submit
from jobs.backends.base import Backend, Request
from unlearn.config import RunConfig
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError, CycleError

UNMEASURED = "--no-evaluate"  # the cycle measures by itself: old requests apart from new ones


def place(to: str, overlay: str, image: str, namespace: str, priority: str) -> Backend:
    """Where to train. Raises ConfigError."""
    if to == "k8s" or to.startswith("k8s:"):
        return submit.backend(to, overlay=overlay, image=image, namespace=namespace, priority=priority)
    return submit.backend(to)


def train(place: Backend, settings: RunConfig, image: str, base: str, check: Callable[[], None]) -> None:
    """Train this run there, unless its model is there already, and return when it is. base: sha256 of what it is to
    start from.

    Where the step is stopped the job goes on; the next attempt finds it. Raises UnlearnError, ClusterError where the
    job has failed.
    """
    folder = Storage(settings.run_dir)
    if not folder.is_file("model/model.json"):
        sent = submit.request(settings, "run", [UNMEASURED], elsewhere=place.remote)
        check_versions(place, sent, image)
        job, new = submit.submit(place, sent)
        print(f"job {job.id} {'was submitted' if new else f'is there already, {job.state}'}: {place.where}", flush=True)
        _follow(place, job.id, check)
    if (card := json.loads(folder.read("model/model.json")))["data"].get("weights") != base:
        raise CycleError(
            f"{folder.uri}: the model was trained from {card['from']}, which is not the base that the cycle began with"
        )


def check_versions(place: Backend, sent: Request, image: str) -> None:
    """Raise ClusterError where the job's Ray is not the one of this step: they must agree to the last number, and so
    must the software."""
    mine = metadata.version("ray")
    if version := getattr(place, "ray_version", None):
        if (theirs := version()) != mine:
            raise ClusterError(
                f"{place.where} runs Ray {theirs}, and this image has {mine}: take images of the same release"
            )
        return
    document: dict[str, Any] = yaml.safe_load(place.plan(sent))
    if document.get("kind") != "RayJob":
        return
    cluster = document["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    if cluster.get("rayVersion") != mine:
        raise ClusterError(
            f"the RayJob is for Ray {cluster.get('rayVersion')}, and this image has {mine}: render the overlay "
            "anew, or take its image"
        )
    if images != {image}:
        raise ClusterError(
            f"the RayJob runs {', '.join(sorted(images))}, and this step {image}: give both the same image"
        )


def _follow(place: Backend, id: str, check: Callable[[], None]) -> None:
    def log() -> None:
        while not over.is_set():
            try:
                for piece in place.logs(id, follow=True):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                return
            except ClusterError:  # not started yet, or out of reach for a while: `wait` has the patience, and its end
                over.wait(5)

    over = threading.Event()
    follower = threading.Thread(target=log, daemon=True)
    follower.start()
    try:
        ended = submit.wait(
            place,
            id,
            lambda row: check(),
            lambda job: print(f"job {job.id}: {job.state}  {job.message}".rstrip(), flush=True),
        )
    finally:
        over.set()
    follower.join(10)  # the end of the log
    if ended.state != "succeeded":
        raise ClusterError(f"job {id}: {ended.state}: {ended.message or 'see its log above'}")
