"""What the components do, called as they call it, in this process; and training that is sent elsewhere."""

import json
from importlib import metadata

import pytest
import yaml
from support.cycles import ask, standing

from jobs import cycle as job
from jobs import submit
from jobs.backends.kubernetes import Kubernetes
from pipelines import elsewhere, steps
from unlearn.errors import ClusterError

IMAGE = "registry.example.com/unlearn:1"


class Artifact:
    """As kfp hands it to a component."""

    def __init__(self, path):
        self.path, self.metadata = str(path), {}

    def log_metric(self, name: str, value: float) -> None:
        assert isinstance(value, float)
        self.metadata[name] = value

    @property
    def text(self) -> str:
        with open(self.path) as f:
            return f.read()


@pytest.fixture
def made(tmp_path):
    """made("model") -> an artifact of that name."""
    (tmp_path / "shown").mkdir()
    return lambda name: Artifact(tmp_path / "shown" / name)


def test_the_steps_serve_a_request_and_can_be_repeated(given, made, capsys, tmp_path):
    one = given(audit={"tests": ["transfer"], "limit": 8, "resamples": 100, "workers": 1})
    source = one.source
    [asked, nobody] = ask(one.cycle, {"subjects": ["person-1"]}, {"subjects": ["nobody-here"]})
    requests, model, metrics, report, audited, audit_page, reasons, released = map(
        made, ("requests", "model", "metrics", "report", "audited", "audit-page", "reasons", "released")
    )
    for again in (False, True):
        status, id = steps.select(source, 1, "yes", requests)
        assert status == "selected" and json.loads(requests.text)["new"] == 1 and requests.metadata["unmatched"] == 1
        steps.unlearn(source, id, 0, steps.HERE, "gpu", IMAGE, "unlearn", "unlearn-request", model)
        assert model.metadata["uri"].endswith("/model") and len(model.metadata["sha256"]) == 64
        steps.evaluate(source, id, 0, metrics, report)
        assert {"original.retain.cosine", "unlearned.forget.cosine", "unlearned.forget_new.psnr"} <= set(
            metrics.metadata
        )
        assert report.text.lower().startswith("<!doctype html>")
        assert bool(list(tmp_path.glob("cycles/*/audited/*"))) is again, "the audit is a step of its own"
        steps.audit(source, id, 0, audited, audit_page)
        [document] = map(json.loads, (p.read_text() for p in tmp_path.glob("cycles/*/runs/*/audit.json")))
        assert audit_page.metadata["verdict"] == document["verdict"]
        assert audit_page.text.lower().startswith("<!doctype html>")
        assert audited.metadata["counts.not_shown"] == 1.0, "of so few images nothing can be said"
        assert (
            steps.judge(source, id, 0, reasons) == "passed"
            and "- kept: metrics.unlearned.retain.cosine" in reasons.text
        )
    for _ in range(2):
        assert steps.release(source, id, 0, released) == "v1" and released.metadata["version"] == "v1"
    assert standing(one.cycle) == {asked: "released", nobody: "received"}
    assert steps.select(source, 1, "yes", made("more")) == ("nothing", "none")
    figures, page = made("figures"), made("page")
    steps.close(source, figures, page)
    assert figures.metadata["pending"] == 1.0 and f"{id} released v1" in page.text
    shown = "".join(p.read_text() for p in (tmp_path / "shown").iterdir()) + capsys.readouterr().out
    assert "person-1" not in shown and "nobody-here" not in shown


def test_a_rung_that_the_gate_refuses(given, made, capsys):
    one = given(gate={"metrics.unlearned.retain.cosine": {"min": 2.0}})
    [asked] = ask(one.cycle, {"classes": ["ant"]})
    _, id = steps.select(one.source, 1, "no", made("requests"))
    steps.unlearn(one.source, id, 0, steps.HERE, "gpu", IMAGE, "unlearn", "unlearn-request", made("model"))
    steps.evaluate(one.source, id, 0, made("metrics"), made("report"))
    reasons = made("reasons")
    assert (
        steps.judge(one.source, id, 0, reasons) == "refused"
        and "- BROKEN: metrics.unlearned.retain.cosine" in reasons.text
    )
    with pytest.raises(SystemExit, match="2"):
        steps.release(one.source, id, 0, made("released"))
    assert "error: " in capsys.readouterr().out
    page = made("page")
    steps.close(one.source, made("figures"), page)
    assert "has not come to its end" in page.text
    steps.give_up(one.source, id)
    steps.close(one.source, made("figures"), page)
    assert "retraining is due" in page.text and standing(one.cycle)[asked] == "received"
    assert steps.select(one.source, 1, "no", made("requests")).Output == "due"


def test_a_mistake_ends_a_step_with_one_line(given, made, capsys):
    with pytest.raises(SystemExit, match="2"):
        steps.select("nowhere.yaml", 1, "no", made("requests"))
    with pytest.raises(SystemExit, match="2"):
        steps.select(given().source, 3, "no", made("requests"))
    with pytest.raises(SystemExit, match="2"):
        steps.select(given(audit={}).source, 1, "no", made("requests"))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("error: ") and "nowhere.yaml" in first
    assert second.startswith("error: ") and "has 1 rungs, and this pipeline was made for 3: compile it again" in second
    assert "asks for an audit, and this pipeline has no step for one: compile it again" in third


def test_training_elsewhere_is_found_again_and_its_log_is_the_steps(given, made, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("UNLEARN_JOBS", str(tmp_path / "jobs"))
    one = given()
    ask(one.cycle, {"classes": ["ant"]})
    _, id = steps.select(one.source, 1, "no", made("requests"))
    # Sent by a step that was lost: the next one follows the same job.
    settings = job.settings(one.cycle, job.opened(one.cycle, id), 0)
    place = elsewhere.place("local", "gpu", IMAGE, "unlearn", "unlearn-request")
    sent = submit.request(settings, "run", [elsewhere.UNMEASURED])
    submit.submit(place, sent)
    steps.unlearn(one.source, id, 0, "local", "gpu", IMAGE, "unlearn", "unlearn-request", made("model"))
    out = capfd.readouterr().out
    assert "is there already" in out and "model: " in out, out
    assert [j.id for j in place.jobs()] == [sent.id] and not list(tmp_path.glob("cycles/*/runs/*/metrics.json"))
    assert "failed" not in out and list(standing(one.cycle).values()) == ["trained"]


def test_a_job_that_fails_fails_its_step(given, made, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("UNLEARN_JOBS", str(tmp_path / "jobs"))
    one = given()
    ask(one.cycle, {"classes": ["ant"]})
    _, id = steps.select(one.source, 1, "no", made("requests"))
    monkeypatch.setenv("UNLEARN_LOG", "loud")  # which the job takes for a mistake
    settings = job.settings(one.cycle, job.opened(one.cycle, id), 0)
    with pytest.raises(ClusterError, match="exit code 2"):
        elsewhere.train(elsewhere.place("local", "gpu", IMAGE, "unlearn", "x"), settings, IMAGE, "0" * 64, lambda: None)


def test_versions_are_compared_before_anything_is_sent(tiny_run, tmp_path):
    run = tiny_run("run_dir=s3://bucket/run", "data.train=s3://bucket/data", "model.weights=s3://bucket/model")
    sent = submit.request(run, "run", [elsewhere.UNMEASURED], elsewhere=True)
    place = elsewhere.place("k8s", "cpu-demo", IMAGE, "unlearn", "unlearn-request")
    elsewhere.check_versions(place, sent, IMAGE)
    document = yaml.safe_load(place.plan(sent))
    assert document["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "unlearn-request"
    assert elsewhere.UNMEASURED in document["spec"]["entrypoint"]
    with pytest.raises(ClusterError, match="give both the same image"):
        elsewhere.check_versions(place, sent, "registry.example.com/unlearn:2")
    document["spec"]["rayClusterSpec"]["rayVersion"] = "2.59.0"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ClusterError, match=f"for Ray 2.59.0, and this image has {metadata.version('ray')}"):
        elsewhere.check_versions(Kubernetes(overlay=str(tmp_path / "other.yaml"), image=IMAGE), sent, IMAGE)

    class Head:
        where = "http://head:8265"

        def ray_version(self):
            return "2.59.0"

    with pytest.raises(ClusterError, match="http://head:8265 runs Ray 2.59.0"):
        elsewhere.check_versions(Head(), sent, IMAGE)
