"""Requests for jobs: their ids, what travels with them, places and tokens."""

import hashlib
import json
import os
import re
import socket
from pathlib import Path

import pytest
import yaml
from support.places import Nowhere

from jobs import submit, token
from jobs import train as training
from jobs.backends.base import Request, next_attempt
from jobs.backends.ray_jobs import RayJobs
from jobs.cluster import connected
from unlearn import config, run
from unlearn.errors import ClusterError, ConfigError, StorageError

# Long enough to be stopped in, with a checkpoint to go back to.


def test_the_same_request_is_the_same_job(tiny_run):
    run = tiny_run()
    first = submit.request(run)
    assert first == submit.request(run) == submit.request(config.parse(yaml.safe_load(first.config)))
    others = [submit.request(tiny_run("seed=4")), submit.request(run, "evaluate"), submit.request(run, "pretrain"),
              submit.request(run, arguments=["--show-forget"]),
              submit.request(tiny_run("run_dir=/elsewhere"))]  # fmt: skip
    assert len({r.id for r in (first, *others)}) == 6
    there = submit.request(tiny_run("cluster.address=10.0.0.1:6379"), elsewhere=True)
    assert there == first  # where it goes it finds another cluster
    assert Request.load(first.dump(), first.config) == first
    source = f"{run.run_dir}/configs/{hashlib.sha256(first.config.encode()).hexdigest()[:16]}.yaml"
    assert first.command == ["-m", "unlearn", "run", source, "--resume"]
    assert submit.request(run, "pretrain").command == ["-m", "unlearn", "pretrain", source, "--resume"]
    former = json.dumps(
        {**{k: v for k, v in json.loads(first.dump()).items() if k != "driver"}, "module": "jobs.train"}
    )
    assert Request.load(former, first.config) == first  # sent when drivers were named as modules


@pytest.mark.parametrize("name", ["run", "Forget_A.Hundred", "7-of-9", "x" * 80, "a.-.-" * 20])
def test_ids_are_names_that_kubernetes_takes(tiny_run, name):
    id = next_attempt(submit.request(tiny_run(f"name={name}")).id, [])
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", id) and len(id) <= 43
    assert next_attempt(id, [id]) == f"{id}-r2" and next_attempt(id, [id, f"{id}-r9", f"{id}-r10"]) == f"{id}-r11"


def test_values_of_secrets_do_not_travel(tiny_run):
    with pytest.raises(ConfigError, match="--env TOKEN: give the name alone") as refusal:
        submit.request(tiny_run(), env=["TOKEN=hunter2"])
    assert "hunter2" not in str(refusal.value)
    with pytest.raises(ConfigError, match="--driver os.system: give run, pretrain, evaluate"):
        submit.request(tiny_run(), "os.system")


@pytest.mark.parametrize("ids", [[], [f"image-{i:06d}" for i in range(9000)]], ids=["small", "large"])
def test_a_configuration_travels_under_its_hash(tiny_run, tmp_path, ids):
    """What a finished run was sent stays as it was when another is sent to its folder; a resume runs it again."""
    here, many = Nowhere(tmp_path / "jobs"), [f"data.forget={{ids: {ids}}}"] if ids else []
    first, second = (submit.request(tiny_run(f"seed={seed}", *many)) for seed in (1, 2))
    submit.submit(here, first)
    Path(first.run_dir, "config.yaml").write_text("of the run")
    here.end(first.id, 0)
    submit.submit(here, second)
    for sent in (first, second):
        settings = run.load(sent.source)
        assert config.dump(settings) == sent.config and (settings.data.forget.ids or []) == ids
        assert sent.variables == {"UNLEARN_JOB": sent.id} and sent.source.startswith(f"{sent.run_dir}/configs/")
    assert Path(first.run_dir, "config.yaml").read_text() == "of the run"
    here.end(second.id, 1)
    submit.resume(here, second.id)
    assert (
        Request.load(json.loads((here.home / second.id / "request.json").read_text())["request"], second.config)
        == second
    )


@pytest.fixture
def umask():
    """As most have it."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_configuration_that_names_rows_is_for_its_owner_alone(tiny_run, tmp_path, umask):
    here = Nowhere(tmp_path / "jobs")
    plain, named = (
        submit.request(tiny_run()),
        submit.request(tiny_run("data.forget={subjects: [person-1]}", f"run_dir={tmp_path}/named")),
    )
    for sent, mode in ((plain, 0o644), (named, 0o600)):
        submit.submit(here, sent)
        assert Path(sent.source).stat().st_mode & 0o777 == mode
        folder = here.home / sent.id
        assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "config.yaml").stat().st_mode & 0o777 == 0o600
    settings = run.load(named.source)
    training.prepare(settings)
    assert Path(settings.run_dir, "config.yaml").stat().st_mode & 0o777 == 0o600
    assert {key for key in ("forget", "retain", "proxy") if config.parse({
        "run_dir": "r", "training": {"steps": 1},
        "data": {"train": "t", "forget": {"classes": [1]}, key: {"ids": ["x"]}},
    }).names_rows} == {"forget", "retain", "proxy"}  # fmt: skip


def test_a_run_folder_that_cannot_be_written_from_here(tiny_run, tmp_path):
    """Its configuration goes into the job's environment, unless it names rows or is too large for that."""
    far, where = (
        Nowhere(tmp_path / "jobs", far=True),
        ["run_dir=/mounted-there/alone/run", "model.weights=s3://b/model", "data.train=s3://b/data"],
    )
    sent = submit.request(tiny_run(*where))
    submit.submit(far, sent, mounted=True)
    found = Request.load(json.loads((far.home / sent.id / "request.json").read_text())["request"], sent.config)
    assert (
        found.source == "env:UNLEARN_CONFIG"
        and found.variables["UNLEARN_CONFIG"] == sent.config
        and found.id == sent.id
    )
    far.end(sent.id, 1)
    submit.resume(far, sent.id)
    assert not Path("/mounted-there").exists()
    for rows in ("ids: [img-001]", "subjects: [person-1]"):
        with pytest.raises(
            StorageError,
            match="/mounted-there.*this machine has no such folder. The configuration names images or persons",
        ):
            submit.submit(far, submit.request(tiny_run(*where, f"data.forget={{{rows}}}")), mounted=True)
    large = [f"data.forget={{classes: {[f'class-{i:06d}' for i in range(9000)]}}}"]
    with pytest.raises(StorageError, match="The configuration is large, so it goes into the run folder"):
        submit.submit(far, submit.request(tiny_run(*where, *large)), mounted=True)


def test_a_configuration_on_s3(tiny_run, s3, tmp_path, told):
    sent = submit.request(tiny_run(f"run_dir={s3}/run", "data.forget={ids: [img-001]}"))
    submit.submit(Nowhere(tmp_path / "jobs"), sent)
    assert sent.source.startswith(f"{s3}/run/configs/")
    code, out, _ = told("config", "show", sent.source)
    assert code == 0 and config.parse(yaml.safe_load(out)) == config.parse(yaml.safe_load(sent.config))
    assert "there is no such" in told("config", "show", f"{s3}/run/configs/other.yaml")[2]


def test_places(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_JOBS", str(tmp_path))
    for to, message in (
        ("ssh://me", "give local, http://HEAD:8265 or k8s"),
        ("http://", "write a Ray cluster as http://HEAD:8265"),
    ):
        with pytest.raises(ConfigError, match=message):
            submit.backend(to).jobs()
    with pytest.raises(ConfigError, match="--working-dir is for a Ray cluster"):
        submit.backend("local", working_dir="/code")
    with pytest.raises(ConfigError, match="no folder `jobs` in it"):
        submit.backend("http://127.0.0.1:1", working_dir=str(tmp_path))
    far = RayJobs("http://10.1.2.3:8265")
    assert far.remote and not RayJobs("http://localhost:8265").remote and not RayJobs("http://127.0.0.1:8265").remote
    assert submit.backend("http://10.1.2.3:8265")._working_dir == str(Path(__file__).parents[2])
    with pytest.raises(ConfigError, match="is a path of this machine, and http://10.1.2.3:8265 runs on others"):
        submit.submit(far, submit.request(tiny_run()))
    elsewhere = [
        "run_dir=s3://b/run",
        "data.train=s3://b/train",
        "model.weights=s3://b/model",
        "evaluation.data=embedded:fashion-test",
    ]
    with pytest.raises(
        ConfigError, match=r"evaluation.oracle /mine is a path of this machine.*--set evaluation.oracle="
    ):
        submit.submit(far, submit.request(tiny_run(*elsewhere, "evaluation.oracle=/mine")))
    with pytest.raises(ClusterError, match="nobody answers at http://127.0.0.1:1 "):
        RayJobs("http://127.0.0.1:1").jobs()


def test_the_job_finds_its_variables(told, tiny_run, tmp_path, monkeypatch):
    assert "env:UNLEARN_CONFIG: this variable is not set" in told("config", "show", "env:UNLEARN_CONFIG")[2]
    sent = submit.request(tiny_run(), env=["WANDB_KEY", "HOME"])
    monkeypatch.setenv("WANDB_KEY", "hunter2")
    submit.submit(Nowhere(tmp_path / "jobs"), sent)
    for name, value in sent.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_KEY")
    monkeypatch.setenv("UNLEARN_LOG", "text")  # a job's log is JSON by itself
    code, _, err = told("config", "show", sent.source)
    assert code == 2 and "error: WANDB_KEY: not set where the job runs, and it was submitted with --env" in err
    monkeypatch.setenv("WANDB_KEY", "hunter2")
    code, out, _ = told("config", "show", sent.source)
    assert code == 0 and config.parse(yaml.safe_load(out)) == tiny_run() and "hunter2" not in out


@pytest.mark.parametrize("found", ["abc\n", "  abc ", "abc\r\n"])
def test_a_token_with_a_line_end_is_one_without(found, monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", found)
    assert token.read() == "abc"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(found)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert token.read() == "abc"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token.read() is None


@pytest.mark.parametrize("wrong", ["hunter2\nhunter2", "hunter2 hunter2", "hunter2\u00e9", "hunter2\x00"])
def test_a_token_that_no_header_can_carry_is_told_and_not_shown(wrong, monkeypatch, tmp_path, told):
    (tmp_path / "token").write_text(wrong)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    message = f"the token in {tmp_path}/token holds blanks, line ends or characters"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code, out, err = told("jobs", "list", "--to", f"http://{address}")
        assert code == 2 and message in err and "hunter2" not in out + err
        with pytest.raises(ClusterError, match=message) as refused:
            with connected(config.Cluster(address=address), 1):
                pass
        assert "hunter2" not in str(refused.value)
