"""What KubeRay, the kubelet and the API server say, in our words."""

import json

from jobs.backends.base import State, error_line

# What KubeRay says of a job, in our words; what it says first is nothing.
STATES = {
    "": State.QUEUED, "Initializing": State.STARTING, "Waiting": State.QUEUED, "Running": State.RUNNING,
    "Retrying": State.STARTING,
    "Suspending": State.QUEUED, "Suspended": State.QUEUED, "Complete": State.SUCCEEDED, "Failed": State.FAILED,
    "ValidationFailed": State.FAILED,
}  # fmt: skip
# Reasons that KubeRay gives, and what to do about them.
HINTS = {
    "PreRunningDeadlineExceeded": (
        "it never started: no room on the nodes, or the image cannot be pulled; see spec.preRunningDeadlineSeconds"
    ),
    "DeadlineExceeded": "it took longer than spec.activeDeadlineSeconds",
    "AppFailed": "the driver failed, its log says why",
    "SubmissionFailed": "the submitter could not hand the job to its cluster; its log says why",
}
# Reasons for which the kubelet keeps a container waiting that do not pass by themselves.
STUCK = (
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "CrashLoopBackOff",
)


def refusal(error, namespace: str, where: str) -> str:
    """What an answer of the server means."""
    try:
        answer = json.loads(error.body)
        message, details = answer.get("message", ""), answer.get("details") or {}
    except (TypeError, ValueError):
        message, details = str(error.body or error.reason or ""), {}
    message = " ".join(message.split())[:400]
    if error.status == 401:
        return f"{where} does not know you: the token or certificate of this context is wrong or has expired"
    if error.status == 403 and "exceeded quota" in message:
        return f"the namespace's quota is used up ({message}): remove jobs, or ask for more"
    if error.status == 403:
        return f"{where} forbids it ({message}): ask for the right in namespace {namespace}"
    if error.status == 404 and details.get("kind") == "namespaces":
        return (
            f"there is no namespace {namespace}: make it (kubectl apply -f jobs/backends/rendered/...), or name "
            "another with --namespace"
        )
    if error.status == 404 and not details.get("name"):
        return "this cluster knows no RayJob (ray.io/v1): install KubeRay and its CRDs"
    if error.status == 404:
        return f"it is not there any more ({message})"
    return f"{where} refuses: {message or error.reason}"


def reason(status: dict) -> str:
    """Why a job is as it is, and what to do about it."""
    why, message = status.get("reason") or "", status.get("message") or ""
    if "last available logs" in message:
        message = error_line(message)
    return ": ".join(filter(None, [why, message, HINTS.get(why, "")]))


def waiting(pod) -> str:
    """What a pod waits for, where it says."""
    for container in (pod.status.container_statuses or []) + (pod.status.init_container_statuses or []):
        held = container.state.waiting if container.state else None
        if held and held.reason in STUCK:
            return f"pod {pod.metadata.name}: {held.reason}: {held.message or container.image}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"pod {pod.metadata.name}: {condition.reason}: {condition.message}"
    return ""
