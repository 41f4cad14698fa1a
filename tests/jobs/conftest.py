"""What the tests of jobs on Kubernetes share."""

from pathlib import Path

import pytest
import yaml
from support.kubernetes_jobs import SPACE, FirstStage, Operator
from support.runs import tiny_config

from jobs import submit


@pytest.fixture
def first_stage(api_server):
    first_stage = FirstStage(api_server)
    yield first_stage
    first_stage.shutdown()
    first_stage.server_close()


@pytest.fixture
def operator(api_server, first_stage, tmp_path, monkeypatch):
    """KUBECONFIG names that server; an operator is at work, and every job is gone afterwards."""
    settings = yaml.safe_load(Path(api_server.kubeconfig).read_text())
    settings["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{first_stage.server_port}"}
    settings["contexts"][0]["context"]["namespace"] = SPACE
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    made = Operator(api_server)
    made.start()
    yield made
    made.over.set()
    made.join()
    for job in made.jobs():
        api_server.delete(job)


@pytest.fixture
def sent(tmp_path):
    """make("a.b=value", ...) -> a request for the small run with two workers; nothing of it is ever trained here."""

    def make(*overrides: str, **options):
        run = tiny_config(
            tmp_path / "run",
            "s3://b/data",
            "s3://b/model",
            "training.engine=deepspeed",
            "cluster.workers=2",
            *overrides,
        )
        return submit.request(run, **options)

    return make
