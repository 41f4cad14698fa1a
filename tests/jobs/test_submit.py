"""What `unlearn submit` sends, and jobs on this machine; on Ray: test_submit_ray.py, on Kubernetes: test_submit_kubernetes.py."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from support.ray_nodes import until
from support.runs import train

from jobs import submit
from jobs.backends.base import Request, State, next_attempt
from jobs.backends.local import Local
from jobs.backends.ray_jobs import RayJobs
from unlearn import config
from unlearn.errors import ClusterError, ConfigError
from unlearn.training.checkpoint import Checkpoints

# Long enough to be stopped in, with a checkpoint to go back to.
LONG = ["training.steps=300", "training.checkpoint_every=20", "training.log_every=20", "training.schedule=constant"]


# What is sent


def test_the_same_request_is_the_same_job(tiny_run):
    run = tiny_run()
    first = submit.request(run)
    assert first == submit.request(run) == submit.request(config.parse(yaml.safe_load(first.config)))
    others = [submit.request(tiny_run("seed=4")), submit.request(run, "evaluate"), submit.request(run, "pretrain"),
              submit.request(run, arguments=["--show-forget"]), submit.request(tiny_run("run_dir=/elsewhere"))]  # fmt: skip
    assert len({r.id for r in (first, *others)}) == 6
    there = submit.request(tiny_run("cluster.address=10.0.0.1:6379"), elsewhere=True)
    assert there == first  # where it goes it finds another cluster
    assert Request.load(first.dump(), first.config) == first
    assert first.command == ["-m", "unlearn", "run", "env:UNLEARN_CONFIG", "--resume"]
    assert submit.request(run, "pretrain").command == ["-m", "unlearn", "pretrain", "env:UNLEARN_CONFIG", "--resume"]
    former = json.dumps({**{k: v for k, v in json.loads(first.dump()).items() if k != "driver"}, "module": "jobs.train"})
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


def test_a_configuration_too_large_for_a_variable_travels_in_the_run_folder(tiny_run, tmp_path, monkeypatch):
    ids = [f"image-{i:06d}" for i in range(9000)]
    sent = submit.request(tiny_run(f"data.forget={{ids: {ids}}}"))
    assert sent.command[3] == sent.run_dir and sent.variables == {"UNLEARN_JOB": sent.id}
    monkeypatch.setattr(Local, "_spawn", lambda *_: {"pid": 1, "started": "never", "host": "x"})
    job, _ = submit.submit(Local(tmp_path / "jobs"), sent)
    assert config.load(Path(job.run_dir, "config.yaml")).data.forget.ids == ids


def test_places(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_JOBS", str(tmp_path))
    for to, message in (("ssh://me", "give local, http://HEAD:8265 or k8s"), ("http://", "write a Ray cluster as http://HEAD:8265")):
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
    elsewhere = ["run_dir=s3://b/run", "data.train=s3://b/train", "model.weights=s3://b/model", "evaluation.data=embedded:fashion-test"]
    with pytest.raises(ConfigError, match=r"evaluation.oracle /mine is a path of this machine.*--set evaluation.oracle="):
        submit.submit(far, submit.request(tiny_run(*elsewhere, "evaluation.oracle=/mine")))
    with pytest.raises(ClusterError, match="nobody answers at http://127.0.0.1:1 "):
        RayJobs("http://127.0.0.1:1").jobs()


def test_the_job_finds_its_configuration_and_its_variables(told, tiny_run, monkeypatch):
    assert "env:UNLEARN_CONFIG: this variable is not set" in told("config", "show", "env:UNLEARN_CONFIG")[2]
    sent = submit.request(tiny_run(), env=["WANDB_KEY", "HOME"])
    for name, value in sent.variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = told("config", "show", "env:UNLEARN_CONFIG")
    assert code == 2 and "error: WANDB_KEY: not set where the job runs, and it was submitted with --env" in err
    monkeypatch.setenv("WANDB_KEY", "hunter2")
    code, out, _ = told("config", "show", "env:UNLEARN_CONFIG")
    assert code == 0 and config.parse(yaml.safe_load(out)) == tiny_run() and "hunter2" not in out


# This machine


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Jobs on this machine in a folder of the test's own; none outlives it."""
    monkeypatch.setenv("UNLEARN_JOBS", str(tmp_path / "jobs"))
    place = Local()
    yield place
    for job in place.jobs():
        place.grace = 0
        place.stop(job.id)


def test_a_job_outlives_its_shell_is_stopped_and_goes_on(told, here, tiny_run, tmp_path):
    """... and ends with the weights of a run that nobody stopped, bit for bit."""
    run = tiny_run(*LONG, "method.name=pretrain")
    whole = run.model_copy(update={"run_dir": str(tmp_path / "whole")})
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(run))
    command = [sys.executable, "-m", "unlearn", "submit", str(path), "--driver", "pretrain"]
    shell = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    id = shell.stdout.strip()
    assert "submitted: running" in shell.stderr and here.get(id).state == State.RUNNING
    assert id in told("jobs", "list")[1] and json.loads(told("jobs", "status", id, "--json")[1])["state"] == "running"
    assert "is running: stop it first" in told("jobs", "rm", id)[2]
    assert "is running: there is nothing to resume" in told("jobs", "resume", id)[2]
    until(lambda: Checkpoints(run.run_dir, 2).steps())
    assert told("jobs", "stop", id)[1] == f"{id}: stopped\n"
    stopped = Checkpoints(run.run_dir, 2).steps()[-1]
    assert stopped < run.training.steps, "the run was over too soon"
    assert "--resume" in told("jobs", "logs", id)[1]

    train(whole)
    code, out, err = told("jobs", "resume", id, "--wait")
    assert code == 0 and f"run folder: {run.run_dir}" in out and f"{id}: succeeded" in err
    weights = "model/weights.safetensors"
    assert Path(run.run_dir, weights).read_bytes() == Path(whole.run_dir, weights).read_bytes()
    assert "model: " in "".join(here.logs(id, follow=True))
    assert "has succeeded: there is nothing to resume" in told("jobs", "resume", id)[2]
    code, out, err = told("submit", path, "--driver", "pretrain", "--wait")
    assert code == 0 and out.startswith(f"{id}\n") and "is there already: succeeded" in err
    assert told("jobs", "rm", id)[0] == 0 and here.jobs() == [] and Path(run.run_dir, weights).exists()
    assert f"no job {id} on this machine" in told("jobs", "status", id)[2]


def test_a_failed_job_says_why_and_is_started_again(told, here, tiny_run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(tiny_run("model.weights=/nowhere.pth")))
    code, out, err = told("submit", path, "--wait")
    id = out.splitlines()[0]
    assert code == 1 and f"{id}: failed exit code 2: error: " in err and "/nowhere.pth" in err
    assert told("submit", path)[0] == 0 and here.get(id).live  # again, since it failed
    process = psutil.Process(json.loads((here.home / id / "process.json").read_text())["pid"])
    until(process.children)[0].kill()
    until(lambda: not here.get(id).live)
    assert "exit code 137" in here.get(id).message and "/nowhere.pth" not in here.get(id).message  # which the first attempt said
    assert told("submit", path)[0] == 0 and here.get(id).live
    assert "--env NOT_SET_ANYWHERE: this variable is not set here" in told("submit", path, "--env", "NOT_SET_ANYWHERE", "--set", f"run_dir={tmp_path}/new")[2]
    assert f"job {id} (running) writes there" in told("submit", path, "--set", "seed=8")[2]


def test_a_killed_job_and_a_pid_that_is_somebody_elses(here, tiny_run):
    job, _ = submit.submit(here, submit.request(tiny_run(*LONG)))
    process = json.loads((here.home / job.id / "process.json").read_text())
    assert os.getpgid(process["pid"]) == process["pid"] != os.getpgrp()
    os.killpg(process["pid"], signal.SIGKILL)
    until(lambda: not here.get(job.id).live)
    assert here.get(job.id).state == State.FAILED and "it was killed" in here.get(job.id).message
    (here.home / job.id / "process.json").write_text(json.dumps(process | {"pid": os.getpid()}))
    assert here.get(job.id).state == State.FAILED


def test_two_at_once_are_one_job(here, tiny_run, monkeypatch):
    started = []
    spawn = Local._spawn
    monkeypatch.setattr(Local, "_spawn", lambda self, *a: started.append(a) or spawn(self, *a))
    sent = submit.request(tiny_run(*LONG))
    threads = [threading.Thread(target=lambda: Local().start(sent)) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(started) == 1 and [job.id for job in here.jobs()] == [sent.id]


def test_waiting_gives_up_on_a_place_that_is_gone_but_not_at_once(monkeypatch):
    class Gone:
        def get(self, id):
            calls.append(id)
            raise ClusterError("nobody answers")

    calls = []
    with pytest.raises(ClusterError, match="nobody answers"):
        submit.wait(Gone(), "x", every=0.01 if monkeypatch.setattr(submit.time, "sleep", lambda s: None) else 10)
    assert len(calls) == 7
