"""The pipeline as Kubeflow gets it, and as kfp's local runner runs it."""

import re
from pathlib import Path

import pytest
import yaml
from support.cycles import ask, standing

from pipelines.place import Place
from unlearn.errors import CycleError

pytest.importorskip("kfp", reason="pip install 'unlearn[pipelines]'")
GOLDEN = Path(__file__).parent / "golden.yaml"
FULL = Place(gpus=1, secrets=(("UNLEARN_LEDGER", "unlearn-cycle", "ledger"),), key=("unlearn-cycle", "releases.key"))
STEPS = {"select", "unlearn", "evaluate", "audit", "judge", "release", "give-up", "close"}


def compiled(path, *arguments, audited: bool = True, **named) -> list[dict]:
    from pipelines import compiling
    from pipelines.cycle import pipeline

    compiling.compile(pipeline(*arguments, audited=audited), str(path), **named)
    return list(yaml.safe_load_all(path.read_text()))


def steps(spec: dict) -> dict[str, dict]:
    """Every task that is a component, by name; those of a second rung end in -2."""
    dags = [spec["root"], *spec["components"].values()]
    tasks = {name: task for dag in dags if "dag" in dag for name, task in dag["dag"]["tasks"].items()}
    return {name: task for name, task in tasks.items() if re.sub(r"-\d+$", "", name) in STEPS}


def test_what_kubeflow_gets_is_as_committed(tmp_path):
    """After a change that is meant: unlearn pipeline compile tests/pipelines/audited.yaml --gpus 1 --secret
    UNLEARN_LEDGER=unlearn-cycle/ledger --key unlearn-cycle/releases.key --output tests/pipelines/golden.yaml"""
    from kfp import components

    assert compiled(tmp_path / "cycle.yaml", 1, FULL) == list(yaml.safe_load_all(GOLDEN.read_text()))
    loaded = components.load_component_from_file(str(GOLDEN))
    assert loaded.name == "unlearn-cycle"
    assert all(given.default for given in loaded.component_spec.inputs.values())  # not None, False, "" or 0


def test_every_step_has_what_it_needs(tmp_path):
    spec, platform = compiled(tmp_path / "cycle.yaml", 3, FULL)
    tasks, executors = steps(spec), spec["deploymentSpec"]["executors"]
    assert {re.sub(r"-\d$", "", name) for name in tasks} == STEPS and {"judge-3", "release-3"} <= set(tasks)
    for name, task in tasks.items():
        assert task["cachingOptions"] == {}, name  # enableCache would stand here
        assert task["retryPolicy"]["maxRetryCount"] == 2, name
        container = executors[f"exec-{name}"]["container"]
        resources, command = container["resources"], " ".join(container["command"])
        assert (
            resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"]
            and "resourceCpuLimit" not in resources
        )
        assert ("accelerator" in resources) is (name.split("-")[0] in ("evaluate", "audit")), name
        assert "pip install" not in command and "from pipelines import steps" in command, name
        pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{name}"]
        assert pod["secretAsEnv"][0]["keyToEnv"] == [{"envVar": "UNLEARN_LEDGER", "secretKey": "ledger"}]
        assert ("secretAsVolume" in pod) is (name.split("-")[0] in ("select", "release")), name  # the key that signs
        assert pod["securityContext"]["runAsNonRoot"] and int(pod["activeDeadlineSeconds"]) >= 3600
    # It only follows a job, unless it trains itself.
    here = compiled(tmp_path / "here.yaml", 1, FULL, "cycle.yaml", "here")[0]
    assert "accelerator" in here["deploymentSpec"]["executors"]["exec-unlearn"]["container"]["resources"]
    conditions = [
        task["triggerPolicy"]["condition"]
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "condition" in task.get("triggerPolicy", {})
    ]
    assert (
        sum("judge" in c and not c.startswith("!") for c in conditions)
        == 3
        == sum(c.startswith("!") for c in conditions)
    )


@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_component_compiles_alone_and_says_what_it_is(name, tmp_path):
    import importlib

    from kfp import compiler, components

    module = importlib.import_module(f"pipelines.components.{name.replace('-', '_')}")
    component = getattr(module, name.replace("-", "_"))
    assert module.__doc__.startswith(f"Component `{component.python_func.__name__}`: ")
    compiler.Compiler().compile(component, str(tmp_path / "component.yaml"))
    loaded = components.load_component_from_file(str(tmp_path / "component.yaml"))
    assert loaded.component_spec.description
    spec = yaml.safe_load((tmp_path / "component.yaml").read_text())
    definitions = spec["components"][f"comp-{name}"]["inputDefinitions"]
    assert all(given.get("description") for given in definitions["parameters"].values())


def test_its_kubernetes_objects_on_a_real_server(tmp_path, api_server):
    from kubernetes.client import ApiException

    documents = compiled(tmp_path / "objects.yaml", 2, FULL, objects=True, namespace="kubeflow")
    assert {d["kind"] for d in documents} == {"Pipeline", "PipelineVersion"}
    for document in documents:
        assert api_server.apply(document) == []
    again = compiled(tmp_path / "again.yaml", 1, FULL, objects=True)
    assert again[-1]["metadata"]["name"] != documents[-1]["metadata"]["name"]  # a version never changes
    with pytest.raises(ApiException, match="field not declared in schema"):
        api_server.apply(documents[0] | {"spec": {"displayname": "x"}})


CANNED = """
import os
from collections import namedtuple

def note(text):
    with open(os.environ["CALLS"], "a") as f:
        f.write(text + "\\n")

def artifact(made):
    with open(made.path, "w") as f:
        f.write("made")
    made.metadata["uri"] = "s3://bucket/made"

def select(source, rungs, audited, requests):
    note(f"select {rungs} {audited}"); artifact(requests)
    return namedtuple("Selected", "Output id")(os.environ["STATUS"], "c1")

def unlearn(source, id, rung, to, overlay, image, namespace, priority, model):
    note(f"unlearn {rung} {to} {priority}"); artifact(model)

def evaluate(source, id, rung, metrics, report):
    note(f"evaluate {rung}"); metrics.log_metric("unlearned.forget.cosine", 0.5); artifact(report)

def audit(source, id, rung, figures, page):
    note(f"audit {rung}"); artifact(page)

def judge(source, id, rung, reasons):
    note(f"judge {rung}"); artifact(reasons)
    return "passed" if rung == int(os.environ["PASSES"]) else "refused"

def release(source, id, rung, released):
    note(f"release {rung} {id}"); artifact(released)
    return "v1"

def give_up(source, id):
    note(f"give up {id}")

def close(source, figures, page):
    note("close"); figures.log_metric("pending", 0.0); artifact(page)
"""


@pytest.mark.parametrize(
    "status, passes, taken",
    [
        ("selected", 0, ["unlearn 0", "evaluate 0", "judge 0", "release 0 c1"]),
        (
            "selected",
            1,
            [
                "unlearn 0",
                "evaluate 0",
                "audit 0",
                "judge 0",
                "unlearn 1",
                "evaluate 1",
                "audit 1",
                "judge 1",
                "release 1 c1",
            ],
        ),
        ("selected", 9, ["unlearn 0", "evaluate 0", "judge 0", "unlearn 1", "evaluate 1", "judge 1", "give up c1"]),
        ("nothing", 0, []),
    ],
)
def test_the_local_runner_takes_the_right_branches(status, passes, taken, tmp_path, monkeypatch):
    """The pipeline itself, with steps that only note that they were called: a process each."""
    from kfp import local

    from pipelines.compiling import quiet
    from pipelines.cycle import pipeline

    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").touch()
    (tmp_path / "pipelines/steps.py").write_text(CANNED)
    monkeypatch.chdir(tmp_path)  # python -m looks here first
    for name, value in {"CALLS": "calls", "STATUS": status, "PASSES": str(passes), "PYTHONPATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with quiet():
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root="out", workspace_root="workspace")
        pipeline(2, Place(retries=0), audited=passes == 1)(cycle="cycle.yaml", to="here")
    calls = Path("calls").read_text().splitlines()
    assert calls[0] == f"select 2 {'yes' if passes == 1 else 'no'}" and calls[-1] == "close"
    assert [call.removesuffix(" here unlearn-request") for call in calls[1:-1]] == taken


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_pipeline_serves_two_requests_then_a_third_that_the_gate_refuses(given, tmp_path, told):
    """The real thing: a process a step."""
    one = given(audit={"tests": ["transfer"], "limit": 2, "resamples": 100})
    first = ask(one.cycle, {"classes": ["ant"]}, {"subjects": ["person-1"]})
    code, out, err = told("pipeline", "run", one.source, "--local", "--artifacts", tmp_path / "shown")
    assert code == 0 and "released v1" in out, out[-3000:] + err
    assert {standing(one.cycle)[number] for number in first} == {"released"}
    for shown in ("evaluate/report", "audit/page"):
        [page] = tmp_path.glob(f"shown/*/{shown}")
        assert page.read_text().startswith("<!doctype html>")
    assert "person-1" not in out + err + "".join(p.read_text() for p in tmp_path.glob("shown/**/*") if p.is_file())
    two = given(gate={"metrics.unlearned.retain.cosine": {"min": 2.0}})
    [third] = ask(two.cycle, {"classes": ["bee"]})
    code, out, _ = told("pipeline", "run", two.source, "--local")
    assert code == 3 and "retraining is due" in out
    assert standing(two.cycle)[third] == "received"


def test_a_branch_that_was_left_out_is_told(given, monkeypatch):
    """kfp's local runner takes a condition that it cannot evaluate for one that does not hold."""
    from pipelines import local

    one = given()
    ask(one.cycle, {"classes": ["ant"]})

    def selects_alone(*arguments, **named):
        def run(**parameters):
            from jobs import cycle as job

            job.select(one.cycle)

        return run

    monkeypatch.setattr("pipelines.cycle.pipeline", selects_alone)
    with pytest.raises(CycleError, match="has left out a step"):
        local.run(one.cycle, one.source)
