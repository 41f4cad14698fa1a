"""The schedule of a pipeline in Kubeflow: a recurring run under a name, replaced as a whole.

Kubeflow cannot change a recurring run, and takes a name any number of times. So the new one is made first, then all
others of that name are deleted: a client that dies between leaves two, of which the next call leaves one, and never
none. What fires twice meanwhile is harmless, since the ledger says what there is to do.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pipelines import cron
from pipelines.kubeflow import Kubeflow
from unlearn.errors import ClusterError, ConfigError

MARK = "made by unlearn: "  # a description of ours, then the hash of what was asked for


@dataclass(frozen=True)
class Schedule:
    """enabled: whether it fires; created: by the server's clock."""

    id: str
    name: str
    cron: str
    enabled: bool
    created: str
    description: str


def replace(
    server: Kubeflow, name: str, expression: str, package: str, parameters: dict, account: str = ""
) -> tuple[str, bool]:
    """Let the compiled pipeline run at these times and no others: (id of the recurring run, whether it was made now).

    No run is caught up on that was missed, none starts beside another, nothing is taken from a cache. Raises
    UnlearnError.
    """
    expression = cron.check(expression)
    if not name.strip():
        raise ConfigError("--name: give a name")
    described = MARK + _digest(expression, package, parameters, account)
    before = [s for s in schedules(server) if s.name == name]
    if same := next((s for s in before if s.description == described and s.enabled), None):
        _delete(server, [s for s in before if s.id != same.id])
        return same.id, False
    client, experiment = server.client, server.experiment_id
    with server.told(f"scheduling {name}"):
        made = client.create_recurring_run(
            experiment, name, described, cron_expression=expression, max_concurrency=1, no_catchup=True,
            params=parameters, pipeline_package_path=package, enable_caching=False, service_account=account or None,
        ).recurring_run_id  # fmt: skip
    now = [s for s in schedules(server) if s.name == name]
    newest = max(now, key=lambda s: (s.created, s.id), default=None)
    _delete(server, [s for s in now if s is not newest])  # of two who replace it at once both leave the same one
    if newest is None or newest.id != made:
        raise ClusterError(
            f"{name}: another has scheduled it at the same time, and theirs is newer; look at it, or schedule it again"
        )
    return newest.id, True


def remove(server: Kubeflow, name: str) -> int:
    """Delete every recurring run of that name; how many there were. Raises UnlearnError."""
    found = [s for s in schedules(server) if s.name == name]
    _delete(server, found)
    return len(found)


def schedules(server: Kubeflow) -> list[Schedule]:
    """All of our experiment. Raises UnlearnError."""
    client, experiment, page, found = server.client, server.experiment_id, "", []
    while True:
        with server.told("listing schedules"):
            answer = client.list_recurring_runs(page_token=page, page_size=100, experiment_id=experiment)
        for item in answer.recurring_runs or []:
            times = item.trigger.cron_schedule if item.trigger else None
            found.append(
                Schedule(
                    item.recurring_run_id,
                    item.display_name,
                    times.cron if times else "",
                    item.status == "ENABLED",
                    str(item.created_at),
                    item.description or "",
                )  # fmt: skip
            )
        page = answer.next_page_token
        if not page:
            return found


def _delete(server: Kubeflow, those: list[Schedule]) -> None:
    for schedule in those:
        try:
            with server.told(f"deleting {schedule.name}"):
                server.client.delete_recurring_run(schedule.id)
        except ClusterError as e:
            if getattr(e, "status", None) != 404:  # another has deleted it
                raise


def _digest(expression: str, package: str, parameters: dict, account: str) -> str:
    told = [expression, Path(package).read_text(), parameters, account]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
