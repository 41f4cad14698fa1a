"""A cycle as OpenLineage tells it, from the requests to the release: run events in plain JSON, one a file, in
`cycle_dir/ID/events/`.

    https://openlineage.io/spec/2-0-2/OpenLineage.json

A run of the job NAME is one attempt at a cycle; below it are runs of NAME.unlearn, one a rung that was judged, and of
NAME.release. All of it follows from the records, so the events of a cycle that was killed are made up for later.
Requests are told by commitment.
"""

import json
import uuid
from collections.abc import Iterator
from typing import Any

from unlearn import __version__
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import Judgement, Outcome, Records, Rows, Selection

SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/"
FACETS = "https://openlineage.io/spec/facets/"
PRODUCER = f"urn:unlearn:{__version__}"
NAMESPACE = "unlearn"

Tree = dict[str, Any]


def write(cycle: Cycle, records: Records, selection: Selection) -> None:
    """Write the events of a cycle that are not there yet."""
    for name, event in events(cycle, records, selection):
        data = json.dumps(event, indent=1, allow_nan=False).encode() + b"\n"
        records.storage.create(f"{selection.id}/events/{name}.json", data)


def events(cycle: Cycle, records: Records, selection: Selection) -> Iterator[tuple[str, Tree]]:
    """(name, event) of all that the records tell, in order."""
    began, judged, ends = selection.at, records.judgements(selection.id), records.outcomes(selection.id)
    under_way = not ends or any(judgement.at > ends[-1].at for judgement in judged)
    for attempt, end in enumerate([*ends, None] if under_way else ends):
        whole = f"{selection.id}/{attempt}"
        inputs = [_dataset(cycle.settings(0).data.train, selection.data), _dataset(cycle.base, selection.base)]
        facets = {"unlearn_requests": _facet("RunFacet", **_requests(selection))}
        yield f"{attempt}-cycle-START", _event("START", began, cycle.name, whole, facets, inputs)
        last = began
        for number, judgement in enumerate(judged):
            if not began <= judgement.at <= (end.at if end else judgement.at):
                continue
            run, model = (
                f"{whole}/{number}",
                _dataset(records.run_folder(selection.id, judgement.run) + "/model", judgement.weights),
            )
            metrics = _dataset(records.run_folder(selection.id, judgement.run) + "/metrics.json", judgement.metrics)
            below = {"parent": _parent(whole, cycle.name)}
            job, gate = f"{cycle.name}.unlearn", {"unlearn_gate": _gate(judgement)}
            yield f"{attempt}-unlearn-{number}-START", _event("START", last, job, run, below, inputs)
            yield (
                f"{attempt}-unlearn-{number}-COMPLETE",
                _event("COMPLETE", judgement.at, job, run, below | gate, inputs, [model, metrics]),
            )
            last = judgement.at
            if end and end.release and judgement.weights == end.weights and judgement.passed:
                job, run = f"{cycle.name}.release", f"{whole}/release"
                yield f"{attempt}-release-START", _event("START", last, job, run, below, [model, metrics])
                made = [_dataset(str(end.folder), str(end.weights)), *_rewritten(end.rows)]
                yield f"{attempt}-release-COMPLETE", _event("COMPLETE", end.at, job, run, below, [model, metrics], made)
        if end:
            made = [_dataset(str(end.folder), str(end.weights))] if end.release else []
            kind = "FAIL" if end.due else "COMPLETE"
            ended = facets | {"unlearn_outcome": _facet("RunFacet", **_outcome(end))}
            yield f"{attempt}-cycle-{kind}", _event(kind, end.at, cycle.name, whole, ended, inputs, made)
            began = end.at


def _event(
    kind: str, at: str, job: str, run: str, facets: Tree, inputs: list[Tree], outputs: list[Tree] | None = None
) -> Tree:  # fmt: skip
    return {
        "eventType": kind, "eventTime": at, "producer": PRODUCER, "schemaURL": f"{SCHEMA}RunEvent",
        "run": {"runId": _run(run), "facets": facets}, "job": {"namespace": NAMESPACE, "name": job},
        "inputs": inputs, "outputs": outputs or [],
    }  # fmt: skip


def _run(name: str) -> str:
    """The same UUID for the same run, however often its events are made."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:unlearn:cycle:{name}"))


def _dataset(uri: str, version: str) -> Tree:
    """A place and what lay there; named as OpenLineage names files and S3 objects."""
    namespace, name = "file", uri
    if uri.startswith("s3://"):
        bucket, _, name = uri.removeprefix("s3://").partition("/")
        namespace = f"s3://{bucket}"
    elif uri.startswith("embedded:"):
        namespace, name = "embedded", uri.removeprefix("embedded:")
    url = f"{FACETS}1-0-1/DatasetVersionDatasetFacet.json#/$defs/DatasetVersionDatasetFacet"
    facet = {"_producer": PRODUCER, "_schemaURL": url, "datasetVersion": version}
    return {"namespace": namespace, "name": name, "facets": {"version": facet}}


def _parent(run: str, job: str) -> Tree:
    url = f"{FACETS}1-0-1/ParentRunFacet.json#/$defs/ParentRunFacet"
    return {
        "_producer": PRODUCER,
        "_schemaURL": url,
        "run": {"runId": _run(run)},
        "job": {"namespace": NAMESPACE, "name": job},
    }


def _facet(kind: str, **values: Any) -> Tree:
    return {"_producer": PRODUCER, "_schemaURL": SCHEMA + kind, **values}


def _requests(selection: Selection) -> Tree:
    return {name: [asked.commitment for asked in getattr(selection, name)] for name in ("new", "old", "unseen")}


def _gate(judgement: Judgement) -> Tree:
    reasons = [str(check) for check in judgement.verdict.reasons] if judgement.verdict else []
    return _facet("RunFacet", passed=judgement.passed, parent=judgement.parent, reasons=reasons)


def _outcome(end: Outcome) -> Tree:
    return {"release": end.release, "promoted": end.promoted, "retrainingDue": end.due}


def _rewritten(rows: Rows | None) -> list[Tree]:
    return [_dataset(rows.uri, rows.after)] if rows else []
