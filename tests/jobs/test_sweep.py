"""Sweeps on a real Ray cluster of this machine: what their trials are, what fails in them, and how they go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load
from support.runs import evaluate, export, tiny_config
from support.workers import together

from jobs import sweep as job
from jobs.study import Study
from jobs.sweep_state import SweepState
from unlearn import config
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.search import space
from unlearn.search.records import Trials, points

STEPS = ["training.engine=deepspeed", "training.micro_batch_size=8", "evaluation.limit=null"]


def tree(folder, tiny_shards, tiny_model, *overrides: str, **keys) -> dict:
    """A sweep of the tiny run; overrides: of the run."""
    run = tiny_config("unused", tiny_shards, tiny_model, *STEPS, *overrides)
    return {
        "sweep_dir": str(folder), "run": run.model_dump(mode="json", exclude_defaults=True), "tune_on": {"limit": 8},
        "objectives": {"retain.cosine.drop": "minimise", "forget.cosine.drop": "maximise"},
        "search": {"method.alpha": {"grid": [0.25, 1.0]}}, "search_by": "grid", **keys,
    }  # fmt: skip


def alone(sweep: space.Sweep, trial, folder) -> config.RunConfig:
    """The run of a trial, in a folder of its own and without a sweep, Ray or anything else that stays."""
    settings = sweep.of(trial.parameters, trial.seed, trial.model, trial.id).model_copy(update={"run_dir": str(folder)})
    together([settings], 1)
    export(settings)
    return settings


def test_a_sweep_of_points_that_end_in_every_way(tiny_shards, tiny_model, s3, tmp_path):
    """On S3, two trials at half a CPU each, points drawn from a space that is smaller than the budget."""
    sweep = space.parse(tree(
        s3, tiny_shards, tiny_model, "training.clip=0", "training.schedule=constant", "cluster.cpus_per_worker=0.5",
        search={
            "data.forget.classes": {"choice": [["ant"], ["bee"], ["unicorn"]]},
            "method.alpha": {"choice": [0.25, 1.0], "when": {"data.forget.classes": [["ant"]]}},
            "training.lr": {"choice": [1.0e-3, 1.0e30], "when": {"data.forget.classes": [["bee"]]}},
            "training.warmup_steps": {"same_as": "training.log_every"}, "training.log_every": {"choice": [1]},
        },
        search_by="random", budget={"points": 20}, concurrent=2, constraints=["retain.cosine.drop <= 1"],
    ))  # fmt: skip
    job.prepare(sweep)
    seen = []
    trials = job.sweep(sweep, seen.append)

    known = {
        (t.parameters["data.forget.classes"][0], *(t.parameters.get(k) for k in ("method.alpha", "training.lr"))): t
        for t in trials
    }
    assert len(trials) == len(known) == 5, "equal points are run once, and the space has no more"
    assert all(t.parameters["training.warmup_steps"] == 1 for t in trials)
    assert (
        known["unicorn", None, None].status == "infeasible"
        and "no class 'unicorn'" in known["unicorn", None, None].message
    )
    failed = known["bee", None, 1e30]
    assert failed.status == "failed" and "not finite" in failed.message and not failed.figures
    done = [known["ant", 0.25, None], known["ant", 1.0, None], known["bee", None, 1e-3]]
    assert all(t.status == "done" and t.steps == 4 and t.ended for t in done)
    assert {t.slot for t in trials if t.started} == {0, 1} and {t.warm for t in done} == {True, False}
    assert {t.id: t for t in Trials(Storage(s3)).all()} == {t.id: t for t in trials}
    assert any(p.rows for p in seen) and any(p.seconds_left for p in seen) and seen[-1].seconds_left == 0
    for point in points(trials, sweep.bounds):
        assert point.complete == point.feasible == (point.trials[0].status == "done")

    warm = next(t for t in done if t.warm)
    settings = alone(sweep, warm, tmp_path / "alone")
    expected = load(Path(settings.run_dir, "model/weights.safetensors").read_bytes())
    found = load(Storage(s3).read(f"{warm.run}/model/weights.safetensors"))
    assert expected.keys() == found.keys() and all((found[name] == expected[name]).all() for name in expected)
    document = yaml.safe_load(Storage(s3).read(f"{warm.run}/metrics.json"))
    assert document["rows"] == evaluate(settings)["rows"], "the original's figures come from the trial before"
    assert Storage(s3).is_file(f"{warm.run}/report.html") and warm.config_hash == document["config_hash"]
    other = next(t for t in done if t is not warm)
    assert Storage(s3).read(f"{other.run}/model/weights.safetensors") != Storage(s3).read(
        f"{warm.run}/model/weights.safetensors"
    )

    with pytest.raises(ConfigError, match="holds another sweep: only budget and concurrent may change"):
        job.prepare(space.parse(space.parse(tree(s3, tiny_shards, tiny_model)).model_dump(mode="json")))
