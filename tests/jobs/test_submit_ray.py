"""Jobs on a real Ray cluster of two nodes on loopback, through its Jobs API."""

import tempfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from support.ray_nodes import TOKEN, Cluster, until
from support.runs import tiny_config
from support.workers import together

from jobs import submit
from jobs.backends.base import GOES_ON, NoSuchJob, State
from jobs.backends.ray_jobs import RayJobs
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError
from unlearn.search.records import Trials
from unlearn.training import metrics
from unlearn.training.checkpoint import Checkpoints

# Long enough to be stopped in, with a checkpoint to go back to; a worker on each node.
LONG = [
    "training.engine=deepspeed", "cluster.workers=2", "training.micro_batch_size=4", "training.steps=300",
    "training.checkpoint_every=20",
    "training.log_every=20", "training.schedule=constant", "method.name=pretrain",
]  # fmt: skip


@pytest.fixture(scope="module")
def ray_cluster():
    pytest.importorskip("aiohttp_cors", reason="pip install 'unlearn[cluster]'")
    with tempfile.TemporaryDirectory(
        prefix="ray-", ignore_cleanup_errors=True
    ) as folder:  # Ray's sockets want a short path
        cluster = Cluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture
def there(ray_cluster: Cluster, monkeypatch) -> RayJobs:
    """The cluster, to whoever has the token."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return RayJobs(ray_cluster.address)


def test_ray_tokens_and_jobs_that_are_not_there(there, told, monkeypatch, tmp_path):
    assert there.jobs() == [] and there._client is not None  # made while the token is known
    assert there.ray_version() == metadata.version("ray")
    assert f"no job x at {there.where}" in told("jobs", "status", "x", "--to", there.where)[2]
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:6379")  # Ray's client would prefer it; --to is what is meant
    assert told("jobs", "list", "--to", there.where)[0] == 0
    monkeypatch.setenv("RAY_AUTH_TOKEN", f"{TOKEN}\n")
    assert told("jobs", "list", "--to", there.where)[0] == 0 and RayJobs(there.where).jobs() == []
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert told("jobs", "list", "--to", there.where)[0] == 0
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert "RAY_AUTH_TOKEN_PATH: there is no file" in told("jobs", "list", "--to", there.where)[2]
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "wants a token, and none was found: set RAY_AUTH_TOKEN" in told("jobs", "list", "--to", there.where)[2]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2-hunter2-hunter2")
    code, out, err = told("jobs", "list", "--to", there.where)
    assert code == 2 and "refuses the token: check RAY_AUTH_TOKEN" in err and "hunter2" not in out + err


HELLO = """
import json, os, sys
from pathlib import Path
def main():
    import yaml
    seed = yaml.safe_load(Path(sys.argv[2]).read_text())["seed"]
    print("seed", seed, "arguments", sys.argv[1], sys.argv[3:], "job", os.environ["UNLEARN_JOB"])
    print("files", sorted(p.name for p in Path.cwd().rglob("*") if p.is_file() and "__pycache__" not in str(p)))
    if "--fail" in sys.argv:
        sys.exit("error: as was wished")
main()
"""


def test_ray_runs_the_code_that_is_sent(there, told, tiny_run, tmp_path, monkeypatch):
    """Here an `unlearn` that says what it was given; of a working directory the packages travel, and nothing else."""
    root = tmp_path / "checkout"
    for name, text in {"jobs/__init__.py": "", "unlearn/__init__.py": "", "unlearn/__main__.py": HELLO,
        ".env": "KEY=hunter2", "runs/old.txt": "x", "jobs/.env": "x",
                       "unlearn/data.txt": "x", "notes.txt": "x"}.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    place = submit.backend(there.where, working_dir=str(root))
    sent = submit.request(tiny_run(), "evaluate", ["--loud"], name="Hello")
    take, refusals = (
        place._client.submit_job,
        ["No available agent to submit job, please try again later."],
    )  # the head has just started

    def submit_job(**options):
        if refusals:
            raise RuntimeError(f"Request failed with status code 500: {refusals.pop()}.")
        return take(**options)

    monkeypatch.setattr(place._client, "submit_job", submit_job)
    job, new = submit.submit(place, sent)
    assert new and job.id.startswith("hello-") and not refusals
    text = "".join(place.logs(job.id, follow=True))
    assert f"seed 3 arguments evaluate ['--loud'] job {job.id}" in text
    assert "files ['__init__.py', '__init__.py', '__main__.py', 'data.txt']" in text
    until(lambda: not place.get(job.id).live)
    assert submit.submit(place, sent) == (place.get(job.id), False) and place.get(job.id).state == State.SUCCEEDED
    there._client.submit_job(entrypoint="true", submission_id="foreign", metadata={"unlearn": "theirs"})
    assert [j.id for j in there.jobs()] == [job.id]
    submit.remove(there, job.id)
    assert there.jobs() == []

    failing = submit.request(tiny_run(), "evaluate", ["--fail"])
    submit.submit(place, failing)
    ended = submit.wait(place, failing.id, every=0.2)
    assert (ended.state, ended.message) == (State.FAILED, "exit code 1: error: as was wished")
    # Resumed with the code it was sent with, by one who does not name it again.
    submit.resume(there, failing.id)
    ended = submit.wait(there, failing.id, every=0.2)
    assert (ended.state, ended.message) == (State.FAILED, "exit code 1: error: as was wished")
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match="was sent with the code in .*/checkout, which is not on this machine"):
        submit.resume(there, failing.id)
    submit.remove(there, failing.id)


@pytest.mark.slow
def test_ray_runs_a_sweep(there, told, tiny_shards, tiny_model, tmp_path):
    """Two slots, one on each node."""
    run = tiny_config("unused", tiny_shards, tiny_model, "training.engine=deepspeed", "training.micro_batch_size=8")
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({
        "sweep_dir": str(tmp_path / "sweep"), "run": run.model_dump(mode="json", exclude_defaults=True),
        "tune_on": {"limit": 8},
        "search": {"method.alpha": {"grid": [0.25, 1.0]}}, "objectives": {"retain.cosine.drop": "minimise"},
        "search_by": "grid",
        "concurrent": 2,
    }))  # fmt: skip
    sent = ("submit", path, "--driver", "sweep", "--to", there.where, "--mounted", "--working-dir", "none")
    code, id, err = told(*sent, "--wait")
    assert code == 0, (err, "".join(there.logs(id.split()[0], follow=False)))
    trials = Trials(Storage(str(tmp_path / "sweep"))).all()
    assert [(t.status, t.parameters["method.alpha"]) for t in trials] == [("done", 0.25), ("done", 1.0)]
    assert told(*sent)[1].strip() in id, "the same sweep is the same job"
    assert told("sweep", "show", "--dir", tmp_path / "sweep", "--json")[0] == 0


def test_ray_job_is_stopped_and_goes_on(there, ray_cluster, told, tiny_shards, tiny_model, tmp_path):
    """The second attempt ends with the weights of a run that nobody stopped; both nodes have a worker. What is to be
    forgotten is named in nothing that Ray keeps, its logs above all."""
    named = [f"img-{number:03d}" for number in range(0, 48, 5)]
    run = tiny_config(tmp_path / "run", tiny_shards, tiny_model, *LONG, f"data.forget={{ids: {named}}}")
    whole = run.model_copy(update={"run_dir": str(tmp_path / "whole")})
    checkpoints = Checkpoints(run.run_dir, 2)
    job, _ = submit.submit(there, submit.request(run))
    until(checkpoints.steps)
    assert told("jobs", "stop", job.id, "--to", there.where)[1] == f"{job.id}: stopped\n"
    stopped = checkpoints.steps()[-1]
    assert stopped < run.training.steps, "the run was over too soon"
    # It ended by itself, with its hint how to go on.
    assert f"unlearn jobs resume {job.id}" in "".join(there.logs(job.id, follow=False))
    rows = []
    assert submit.resume(there, job.id).live
    ended = submit.wait(there, job.id, rows.append, every=0.2)
    assert ended.state == State.SUCCEEDED, "".join(there.logs(job.id, follow=False))
    assert rows[0]["step"] > stopped - 20 and {row["workers"] for row in rows} == {2}
    together([whole], 2)
    folder = f"checkpoints/step-{run.training.steps:08d}"
    for file in sorted(Path(whole.run_dir, folder).glob("*.safetensors")):
        assert file.read_bytes() == Path(run.run_dir, folder, file.name).read_bytes()

    def holds(folder: Path, text: str) -> list[str]:
        return [path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]

    kept = ray_cluster.folder / "ray"
    assert (
        holds(kept, job.id)
        and holds(Path(run.run_dir), named[1])
        and not [name for id in named for name in holds(kept, id)]
    )
    assert [d.submission_id for d in there._details() if d.submission_id.startswith(job.id)] == [f"{job.id}-r2", job.id]
    assert [j.id for j in there.jobs()].count(job.id) == 1


@pytest.mark.slow
def test_ray_goes_on_with_fewer_workers_when_a_node_dies_and_with_all_when_it_is_back(
    there, ray_cluster, tiny_shards, tiny_model, tmp_path
):
    import torch
    from safetensors.torch import load_file

    run = tiny_config(tmp_path / "run", tiny_shards, tiny_model, *LONG, "training.steps=4000", "cluster.min_workers=1")
    job, _ = submit.submit(there, submit.request(run))
    until(lambda: Checkpoints(run.run_dir, 2).steps())
    ray_cluster.kill("second")
    killed = Checkpoints(run.run_dir, 2).steps()[-1]
    until(lambda: metrics.read(run.run_dir)[-1]["workers"] == 1)
    ray_cluster.start_second()
    until(lambda: metrics.read(run.run_dir)[-1]["workers"] == 2 or not there.get(job.id).live, 600)
    ended = submit.wait(there, job.id)
    log = "".join(there.logs(job.id, follow=False))
    assert ended.state == State.SUCCEEDED, log
    rows = metrics.read(run.run_dir)
    first = next(row["step"] for row in rows if row["workers"] == 1)
    assert killed < first <= killed + 60 and "with 1 of 2 workers" in log and rows[-1]["workers"] == 2
    whole = run.model_copy(update={"run_dir": str(tmp_path / "whole")})
    together([whole], 2)
    found, expected = (load_file(f"{r.run_dir}/model/weights.safetensors") for r in (run, whole))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_lost_head(there, ray_cluster, tiny_shards, tiny_model, tmp_path, monkeypatch):
    """First its node alone, while the cluster's records can still be asked; then all of it. The same submit goes on
    afterwards."""
    monkeypatch.setattr(submit, "PATIENCE", 20)
    run = tiny_config(
        tmp_path / "run", tiny_shards, tiny_model, *LONG, "training.steps=100000", "cluster.max_failures=0"
    )
    sent, told = submit.request(run), []
    submit.submit(there, sent)
    until(lambda: metrics.read(run.run_dir) and Checkpoints(run.run_dir, 2).steps())
    [raylet] = [p for p in ray_cluster.processes("head") if p.name() == "raylet"]
    raylet.kill()
    ended = submit.wait(there, sent.id, told=told.append)
    assert ended.state == State.FAILED and "the head's node is lost" in ended.message and GOES_ON in ended.message
    ray_cluster.close()
    with pytest.raises(ClusterError, match=f"The job is out of reach; when the cluster is there, {GOES_ON}"):
        submit.wait(there, sent.id, told=told.append)
    ray_cluster.start_head()
    ray_cluster.start_second()
    with pytest.raises(NoSuchJob, match=f"The job is forgotten there, .*{GOES_ON}"):
        submit.wait(there, sent.id, told=told.append)
    saved = Checkpoints(run.run_dir, 2).steps()[-1]
    job, new = submit.submit(there, sent)
    assert new and job.id == sent.id
    until(lambda: metrics.read(run.run_dir)[-1]["step"] > saved)
    there.stop(sent.id)
