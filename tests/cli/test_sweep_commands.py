"""The commands on a sweep, on real run folders of tiny trials: list, show, best, promote, report."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from support import sweeps
from support.command import refused
from support.images import CLASSES, tiny_table
from support.runs import evaluate, tiny_config, train

from jobs import sweep_report
from unlearn.cli.sweep_table import headline, live, status
from unlearn.data import shards
from unlearn.data.storage import Storage
from unlearn.search import alone, objectives, sweep_file
from unlearn.search.records import Trial, Trials

ALPHAS = [0.1, 10.0, 100.0]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny_shards, tiny_model) -> str:
    """A sweep of three alphas by two seeds, all trained; one trial of p002 has failed. Its folder."""
    root = tmp_path_factory.mktemp("swept")
    held_out = root / "held-out"
    held_out.mkdir()
    pq.write_table(tiny_table(0, 48).slice(4, 28), held_out / "shard-0.parquet", row_group_size=8)
    shards.save(replace(shards.index(str(held_out)), classes=CLASSES))
    run = tiny_config(
        "unused",
        tiny_shards,
        tiny_model,
        "training.checkpoint_every=4",
        f"evaluation.data={held_out}",
        "evaluation.pictures=2",
        "evaluation.views=[{size: 0.5}]",
    )
    sweep = sweep_file.parse({
        "sweep_dir": str(root / "runs/tiny"), "name": "tiny", "seeds": [3, 4],
        "run": run.model_dump(mode="json", exclude_defaults=True),
        "search": {"method.alpha": {"grid": ALPHAS}}, "search_by": "grid", "tune_on": {"limit": 8},
        "objectives": {"retain.cosine.drop": "minimise", "forget.cosine.drop": "maximise"},
        "constraints": ["retain.cosine.drop <= 1"],
    })  # fmt: skip
    trials = []
    for number, parameters in enumerate(sweep.grid()):
        for seed, model in sweep.pairs():
            id = sweep.trial_id(f"p{number:03d}", seed, model)
            trial = Trial(
                id,
                f"p{number:03d}",
                seed,
                model,
                parameters,
                run=f"runs/{id}",
                status="failed",
                message="a worker has died",
            )
            if (number, seed) != (2, 4):
                settings = sweep.of(parameters, seed, model, id)
                train(settings)
                # What moves with alpha is written by hand: every point is then on the front.
                figures = {"retain.cosine.drop": 0.01 * number + seed / 1000, "forget.cosine.drop": 0.1 * number}
                trial = replace(trial, status="done", message=None, figures=figures)
            trials.append(trial)
    sweeps.write(sweep, trials)
    return sweep.sweep_dir


def test_list_and_show(told, swept, monkeypatch):
    code, out, _ = told("sweep", "list", Path(swept).parents[1])
    assert code == 0 and re.search(r"tiny +3 +2 +5 of 6 done, 1 failed", out)
    monkeypatch.chdir(Path(swept).parents[1])  # the only sweep below runs/ is meant
    out = told("sweep", "show")[1]
    assert "front 2 of 3 points" in out and re.search(r"◆ +p001 +10 +0.0135 ± 0.00071 +0.1 ± 0 +2/2", out)
    out = told("sweep", "show", "p002")[1]
    assert "1 of 2 done, 1 failed, a worker has died" in out and "alpha: 100.0" in out and "runs/p002-s3-m0" in out
    assert json.loads(told("sweep", "show", "p001", "--json")[1])["mean"]["forget.cosine.drop"] == 0.1
    assert json.loads(told("sweep", "show", "--json")[1])["trials"] == {"done": 5, "failed": 1}
    assert "no point 'p009'; there are p000, p001, p002" in refused(told, "sweep", "show", "p009")


def test_best_prints_a_configuration(told, swept, tmp_path):
    code, out, err = told("sweep", "best", "--dir", swept)
    assert (
        code == 0
        and out.startswith(f"# p000 of {swept}: retain.cosine.drop 0.0035 ± 0.00071")
        and "sweep promote p000" in err
    )
    for bounds, point in ((["forget.cosine.drop >= 0.05"], "p001"), (["retain.cosine.drop <= 0.01"], "p000")):
        where = [word for bound in bounds for word in ("--where", bound)]
        out = told("sweep", "best", "--dir", swept, "--by", "forget.cosine.drop", *where)[1]
        assert out.startswith(f"# {point} of")
    tree = yaml.safe_load(out)
    assert tree["method"]["alpha"] == 0.1 and tree["seed"] == 3 and tree["evaluation"]["data"].endswith("held-out")


def test_mistakes(told, swept, tmp_path, monkeypatch):
    best = ("sweep", "best", "--dir", swept)
    assert "the nearest is p000 with retain.cosine.drop 0.0035" in refused(
        told, *best, "--where", "retain.cosine.drop <= 0.001"
    )
    assert "--where: 'cosine < 1' is no constraint" in refused(told, *best, "--where", "cosine < 1")
    assert "--where: no figure 'retain.beauty'" in refused(told, *best, "--where", "retain.beauty <= 1")
    assert "no objective of this sweep" in refused(told, *best, "--by", "retain.fid")
    assert "neither a YAML file nor the folder of a sweep" in refused(told, "sweep", "show", "--dir", tmp_path)
    assert "name the sweep with --dir FOLDER" in refused(told, "sweep", "show")
    assert "neither a YAML file nor the folder of a sweep" in refused(told, "sweep", "shwo")
    assert f"no sweep below {tmp_path}" in told("sweep", "list", tmp_path)[1]
    promote = ("sweep", "promote", "--dir", swept)
    assert "p002 has no trial that is done with seed 4" in refused(
        told, *promote, "p002", tmp_path / "x", "--seed", "4"
    )
    Storage(tmp_path / "taken").write("config.yaml", b"")
    assert "holds a run: give a new folder" in refused(told, *promote, "p000", tmp_path / "taken")
    for module, package in (("plotly.graph_objects", "plotly"), ("optuna", "optuna")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            err = refused(told, "sweep", "report", "--dir", swept)
            assert f"the page of a sweep needs {package}, which is not installed: pip install 'unlearn[sweep]'" in err


def test_promote_makes_the_folder_of_a_run(told, swept, tmp_path, s3):
    """The same files, model and figures as the run of the configuration that `best` prints; here on S3."""
    (tmp_path / "best.yaml").write_text(told("sweep", "best", "--dir", swept)[1])
    assert told("run", tmp_path / "best.yaml", "--set", f"run_dir={tmp_path / 'alone'}")[0] == 0
    code, out, _ = told("sweep", "promote", "p000", f"{s3}/promoted", "--dir", swept)
    assert code == 0 and f"run folder: {s3}/promoted" in out
    by_itself, promoted = Storage(tmp_path / "alone"), Storage(f"{s3}/promoted")
    plain = [name for name in by_itself.files() if "tensorboard" not in name]
    assert [name for name in promoted.files() if "tensorboard" not in name] == [
        name for name in plain if not name.startswith(".")
    ]
    same = [name for name in plain if name.startswith("model/")]
    assert len(same) == 2 and all(by_itself.read(name) == promoted.read(name) for name in same)
    one, other = (json.loads(folder.read("metrics.json")) for folder in (by_itself, promoted))
    assert one["rows"] == other["rows"] and one["config_hash"] == other["config_hash"]
    assert one["sets"]["forget"]["split"] == "held-out"


def test_report_measures_the_front_on_held_out_images(told, swept, capsys):
    sweep, known = sweep_file.load(swept), Trials(Storage(swept))
    code, out, _ = told("sweep", "report", "--dir", swept)
    assert code == 0 and "held out" in out and re.search(r"p001 +0.0135", out)
    trials = {trial.id: trial for trial in known.all()}
    assert [id for id, trial in trials.items() if trial.held_out] == [
        "p000-s3-m0",
        "p000-s4-m0",
        "p001-s3-m0",
        "p001-s4-m0",
    ]
    # As the evaluation of one of them alone has it.
    document = evaluate(alone.settings(sweep, trials["p001-s4-m0"]))
    assert document["sets"]["retain"]["split"] == "held-out"
    expected = objectives.of_document(document, "unlearned")
    assert {name: trials["p001-s4-m0"].held_out[name] for name in expected} == expected
    html = Storage(swept).read("report.html").decode()
    assert html.count('alt="retain image') == 3 * 2 * 4 and 'alt="forget image' not in html
    pictures = json.loads(re.search(r'id="pictures">(.*?)</script>', html)[1])
    assert len(pictures) > 3 * 2  # every point has its own beside those that all have
    assert "unlearned model" in html and "original model" in html
    # What was measured is not measured again, and the page may show the forget set.
    Trials(Storage(swept)).write(
        replace(trials["p001-s4-m0"], held_out={"retain.cosine.drop": 0.5, "forget.cosine.drop": 0.5})
    )
    assert told("sweep", "report", "--dir", swept, "--show-forget")[0] == 0
    assert known.read("p001-s4-m0").held_out["retain.cosine.drop"] == 0.5
    assert Storage(swept).read("report.html").decode().count('alt="forget image') == 3 * 2 * 4
    assert "The points of the front were then" in html
    code, _, warned = told("sweep", "report", "--dir", swept, "--all")
    assert code == 0 and "no held-out images" not in warned
    assert all(trial.held_out for trial in known.all() if trial.status == "done")
    assert "All points were then measured once more" in Storage(swept).read("report.html").decode()
    sweep_report.report(sweep_file.load(swept, ["run.evaluation.data=null"]), whole=True)
    assert (
        "--all: the run names no held-out images (evaluation.data), so nothing is measured on them"
        in capsys.readouterr().err
    )


def test_a_sweep_that_runs_is_shown(tmp_path, capsys):
    sweep, trials = sweeps.grid_sweep(tmp_path, budget={"points": 8}), sweeps.grid_trials()[:8]
    trials.append(replace(trials[0], id="p002-s2-m0", point="p002", seed=2, status="running", figures={}, ended=""))
    with live(sweep) as shown:
        for _ in range(3):  # nothing has changed in between: one line
            shown(trials, {}, 754.0)
    told = capsys.readouterr().err
    assert told == f"{headline(sweep, trials, 754.0)}\n"
    assert "fashion: 8 of 24 done, 1 running, front 2 of 3 points, 13 min left" in told
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(status(sweep, trials, {"p002-s2-m0": {"step": 40, "steps": 100}}, shown=2))
    table = console.export_text()
    assert "p000" in table and "p002-s2-m0 40/100" in table and len(table.splitlines()) == 6
