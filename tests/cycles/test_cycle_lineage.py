"""OpenLineage events: of the published form, the same however often they are made, from the requests to the release."""

import json
from pathlib import Path

import jsonschema
import pytest
from support.cycles import LIMIT, ask

from jobs import cycle as job
from unlearn.cycles import lineage
from unlearn.cycles.records import Records

TEXT, URI = {"type": "string", "minLength": 1}, {"type": "string", "pattern": "^[a-z]+:"}
FACET = {
    "type": "object",
    "properties": {"_producer": URI, "_schemaURL": {"type": "string", "pattern": "^https://openlineage.io/spec/"}},
    "required": ["_producer", "_schemaURL"],
}  # fmt: skip
FACETS = {"type": "object", "additionalProperties": FACET}
DATASETS = {"type": "array", "items": {
    "type": "object", "properties": {"namespace": TEXT, "name": TEXT, "facets": FACETS},
    "required": ["namespace", "name"],
}}  # fmt: skip
# What the specification (2-0-2) asks of a RunEvent.
EVENT = {
    "type": "object", "additionalProperties": False,
    "required": ["eventTime", "producer", "schemaURL", "run", "job", "eventType"],
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]}, "producer": URI,
        "schemaURL": URI,
        "eventTime": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$"},
        "run": {"type": "object", "required": ["runId"], "properties": {
            "runId": {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}, "facets": FACETS}},
        "job": {"type": "object", "required": ["namespace", "name"], "properties": {"namespace": TEXT, "name": TEXT}},
        "inputs": DATASETS, "outputs": DATASETS,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def told(made):
    """(cycle, its selection, its events as they were written) of a cycle that was given up once and then released."""
    cycle = made(gate={LIMIT: {"min": 2.0}})
    ask(cycle, {"subjects": ["person-1"]})
    job.run(cycle)
    eased = cycle.model_copy(update={"gate": None})
    ended = job.run(eased)
    written = {
        path.stem: json.loads(path.read_text())
        for path in Path(cycle.cycle_dir, ended.selection.id, "events").iterdir()
    }
    return eased, ended, written


def test_the_events_are_of_the_published_form_and_every_run_begins_and_ends(told):
    cycle, ended, written = told
    for event in written.values():
        jsonschema.validate(event, EVENT)
        assert "person-" not in json.dumps(event)
    made = dict(lineage.events(cycle, Records(cycle.cycle_dir), ended.selection))
    assert written == made
    runs: dict[str, list[str]] = {}
    for event in made.values():
        runs.setdefault(event["run"]["runId"], []).append(event["eventType"])
    assert sorted(map(tuple, runs.values())) == [("START", "COMPLETE")] * 4 + [("START", "FAIL")]
    assert [event["eventTime"] for event in made.values() if event["job"]["name"] == "cycle"] == sorted(
        event["eventTime"] for event in made.values() if event["job"]["name"] == "cycle"
    )


def test_the_line_from_the_requests_to_the_release_is_whole(told):
    cycle, ended, written = told
    gate = [written[f"{n}-unlearn-{n}-COMPLETE"]["run"]["facets"]["unlearn_gate"] for n in (0, 1)]
    assert [(g["passed"], len(g["reasons"])) for g in gate] == [(False, 1), (True, 0)]
    first, unlearned, released = (
        written[name] for name in ("1-cycle-START", "1-unlearn-1-COMPLETE", "1-release-COMPLETE")
    )
    assert first["run"]["facets"]["unlearn_requests"]["new"] == [asked.commitment for asked in ended.selection.new]
    versions = [
        {d["facets"]["version"]["datasetVersion"] for d in part} for part in (first["inputs"], unlearned["inputs"])
    ]
    assert versions[0] == versions[1] == {ended.selection.base, ended.selection.data}
    assert unlearned["outputs"] == released["inputs"] and released["outputs"][0]["name"] == ended.outcome.folder
    assert released["outputs"][0]["facets"]["version"]["datasetVersion"] == ended.outcome.weights
    parent = released["run"]["facets"]["parent"]
    assert parent["run"]["runId"] == first["run"]["runId"] and parent["job"] == first["job"]
