"""Jobs on this machine, and waiting for jobs wherever they are."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from support.places import Nowhere
from support.ray_nodes import until
from support.runs import train

from jobs import submit
from jobs.backends.base import GOES_ON, Job, NoSuchJob, Request, State
from jobs.backends.local import Local
from unlearn import config
from unlearn.errors import ClusterError
from unlearn.training.checkpoint import Checkpoints

LONG = ["training.steps=300", "training.checkpoint_every=20", "training.log_every=20", "training.schedule=constant"]


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
    assert f"unlearn jobs resume {id}" in told("jobs", "logs", id)[1]

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
    assert (
        "exit code 137" in here.get(id).message and "/nowhere.pth" not in here.get(id).message
    )  # which the first attempt said
    assert told("submit", path)[0] == 0 and here.get(id).live
    assert (
        "--env NOT_SET_ANYWHERE: this variable is not set here"
        in told("submit", path, "--env", "NOT_SET_ANYWHERE", "--set", f"run_dir={tmp_path}/new")[2]
    )
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


def test_a_folder_that_is_not_a_job_is_no_job(told, here, tiny_run):
    sent = submit.request(tiny_run(*LONG))
    submit.submit(here, sent)
    for name, text in {
        "foreign": "{}",
        "damaged": "{",
        "other": '{"request": "[]", "submitted": 1}',
        "old": '{"request": "{\\"id\\": 1}", "submitted": 1}',
    }.items():
        (here.home / name).mkdir()
        (here.home / name / "request.json").write_text(text)
        assert f"no job {name} on this machine" in told("jobs", "status", name)[2]
    assert [job.id for job in here.jobs()] == [sent.id]


def test_the_list_cuts_nothing(told, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("COLUMNS", "80")
    place, run_dir = Nowhere(tmp_path / "jobs"), f"{tmp_path}/{'[long]' * 30}"
    place.start(Request("a", run_dir, "run"))
    place.end("a", 1)
    line = told("jobs", "list")[1].splitlines()[1]
    assert line.split()[:2] == ["a", "failed"] and run_dir in line and line.endswith("exit code 1:")


class Scripted:
    """A place whose job is what `script` says, one after another; its driver has printed `log`."""

    where = "far"

    def __init__(self, *script: Job | ClusterError, log: str = ""):
        self.script, self.log, self.asked = list(script), log, 0

    def get(self, id: str) -> Job:
        self.asked += 1
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, ClusterError):
            raise answer
        return answer

    def logs(self, id: str, follow: bool):
        yield self.log


@pytest.fixture
def job(tmp_path):
    return lambda state, message="": Job("x", state, str(tmp_path / "run"), 1.0, message)


def test_waiting_gives_up_on_a_place_that_is_gone_but_not_at_once(monkeypatch, job):
    monkeypatch.setattr(submit.time, "sleep", lambda s: None)
    for error, what in (
        (ClusterError("nobody answers"), "out of reach"),
        (NoSuchJob("no job x"), "forgotten there, as when a cluster's head is lost"),
    ):
        place, told = Scripted(job(State.RUNNING), error), []
        with pytest.raises(type(error), match=f"{error}. The job is {what}; when the cluster is there, {GOES_ON}"):
            submit.wait(place, "x", told=lambda job, told=told: told.append(job.message), every=10)
        assert place.asked == 8 and told == ["", f"{error}; asking again for 60 s"]
    assert submit.wait(Scripted(error, job(State.SUCCEEDED)), "x", every=10).state == State.SUCCEEDED


def test_what_a_silent_job_waits_for_is_told(monkeypatch, job):
    monkeypatch.setattr(submit, "PATIENCE", 0.05)
    waits = "warning: waits for room: 2 workers want 2 CPUs"
    place, told = Scripted(job(State.RUNNING), log=f"training 4/8\nwarning: seldom\n{waits}\nother\n"), []

    def note(job: Job) -> None:
        told.append(job.message)
        if job.message == waits:
            place.script = [job_over]

    job_over = job(State.SUCCEEDED)
    submit.wait(place, "x", told=note, every=0.01)
    assert told == ["", waits, ""]
    quiet = Scripted(job(State.RUNNING), log="training 4/8\n")
    threading.Timer(0.5, lambda: quiet.script.append(quiet.script.pop() and job_over)).start()
    told.clear()
    submit.wait(quiet, "x", told=note, every=0.01)
    assert told == ["", ""]
