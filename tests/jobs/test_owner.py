"""A run folder has one owner: of two commands of the same second one is refused by name of the other, on disk and on
S3."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from support.command import refused
from support.ray_nodes import until
from support.runs import tiny_config, train

from jobs import owner, submit
from jobs.backends.local import Local
from unlearn import config, lease
from unlearn.data.storage import Storage, local_copy
from unlearn.errors import ClusterError, LeaseError
from unlearn.training.checkpoint import Checkpoints


def started(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "unlearn", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}
    )


@pytest.mark.parametrize("place", [pytest.param("file", marks=pytest.mark.slow), "s3"], indirect=True)
def test_two_runs_of_the_same_second(place, tiny_shards, tiny_model, tmp_path):
    """The one that is refused says by whom; model, metrics and configuration are of the other alone."""
    for seed in (1, 2):
        run = tiny_config(place, tiny_shards, tiny_model, f"seed={seed}", "training.steps=40", "evaluation.limit=4")
        (tmp_path / f"{seed}.yaml").write_text(config.dump(run))
    drivers = {seed: started("run", tmp_path / f"{seed}.yaml") for seed in (1, 2)}
    said = {seed: driver.communicate(timeout=900)[1] for seed, driver in drivers.items()}
    codes = {seed: driver.returncode for seed, driver in drivers.items()}
    assert sorted(codes.values()) == [0, 2], said
    [won] = [seed for seed, code in codes.items() if code == 0]
    [lost] = {1, 2} - {won}
    assert (
        said[lost].count("error:") == 1 and f"in use by `unlearn run` (process {drivers[won].pid} on" in said[lost]
    ), said[lost]
    storage = Storage(place)
    settings = config.read(storage.read("config.yaml").decode(), "config.yaml")
    card, metrics = json.loads(storage.read("model/model.json")), json.loads(storage.read("metrics.json"))
    assert settings.seed == won and card["config_hash"] == settings.hash() and metrics["rows"]
    again = tiny_config(
        tmp_path / "again", tiny_shards, tiny_model, f"seed={won}", "training.steps=40", "evaluation.limit=4"
    )
    train(again)
    with local_copy(storage.where("model/weights.safetensors")) as path:
        found, expected = load_file(path), load_file(tmp_path / "again/model/weights.safetensors")
    assert all((found[name] == value).all() for name, value in expected.items())


def test_every_command_and_submit_are_refused_while_another_owns_the_folder(told, written, tmp_path, tiny_run):
    path, folder = written(), tmp_path / "run"
    assert told("run", path)[0] == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != lease.NAME}
    with owner.owned(str(folder), "run"):
        for command in (["run", path], ["run", path, "--resume"], ["evaluate", folder], ["report", folder]):
            assert f"in use by `unlearn run` (process {os.getpid()} on" in refused(told, *command)
        with pytest.raises(ClusterError, match=f"in use by `unlearn run` .process {os.getpid()} on"):
            submit.submit(Local(tmp_path / "jobs"), submit.request(tiny_run()))
    assert {p: p.read_bytes() for p in before} == before
    assert told("report", folder)[0] == 0  # it was given up


def test_a_killed_run_goes_on_at_once(written, tmp_path):
    path = written("training.steps=100000", "training.checkpoint_every=20", "method.name=pretrain")
    driver, checkpoints = started("pretrain", path), Checkpoints(str(tmp_path / "run"), 2)
    until(lambda: driver.poll() is not None or checkpoints.steps())
    driver.kill(), driver.wait()
    last = checkpoints.steps()[-1]
    driver = started("pretrain", path, "--resume")
    until(lambda: driver.poll() is not None or checkpoints.steps()[-1] > last)
    driver.send_signal(signal.SIGTERM)
    err = driver.communicate(timeout=600)[1]
    assert driver.returncode == 143 and "waiting up to" not in err, err


def test_training_stops_where_the_lease_is_lost(told, written, tmp_path, monkeypatch):
    """Another has taken the folder over: nothing more is exported."""
    monkeypatch.setattr(lease.Lease, "lost", property(lambda self: "another has taken it over"))
    err = refused(told, "pretrain", written("method.name=pretrain"))
    assert "no longer owned by this process: another has taken it over" in err and not (tmp_path / "run/model").exists()


def test_a_file_that_is_gone_with_the_folder_is_told_so(tmp_path):
    with pytest.raises(LeaseError, match="run was deleted while it was written to"):
        with owner.owned(str(tmp_path / "run"), "run"):
            shutil.rmtree(tmp_path / "run")
            Storage(tmp_path / "run").read("config.yaml")


def test_a_run_folder_that_is_deleted_meanwhile_is_a_failure_with_one_message(told, written, tmp_path, monkeypatch):
    """At a step, and while it is measured: nothing is said to be there that is gone."""
    from unlearn.cli import console

    folder, note = tmp_path / "run", console.training

    def deleting(row: dict) -> tuple[int, int, str]:
        while folder.exists():  # the thread that writes metrics may write once more
            shutil.rmtree(folder, ignore_errors=True)
        return note(row)

    monkeypatch.setattr(console, "training", deleting)
    code, out, err = told("run", written("training.steps=30"))
    assert code == 2 and err.count("error:") == 1 and f"{folder} was deleted while it was written to" in err, err
    assert "model:" not in out and "report:" not in out
