"""Sweeps on a real Ray cluster of this machine: what their trials are, what fails in them, and how they go on."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import yaml
from safetensors.torch import load
from support.driver import Driver
from support.runs import evaluate, export
from support.sweeps import tiny_tree as tree
from support.workers import together
from tensorboardX.proto.event_pb2 import Event

from jobs import callbacks, slots, submit
from jobs import sweep as job
from jobs.backends import base
from jobs.cluster import connected
from jobs.study import Study
from jobs.suggestions import Suggestions
from jobs.sweep_state import Progress, SweepState
from unlearn import config, signals
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, UnlearnError
from unlearn.evaluation import measure
from unlearn.run import resolve
from unlearn.search import space, sweep_file
from unlearn.search.records import Trials, points
from unlearn.training import metrics
from unlearn.training.checkpoint import Checkpoints


def alone(sweep: space.Sweep, trial, folder) -> config.RunConfig:
    """The run of a trial, in a folder of its own and without a sweep, Ray or anything else that stays."""
    settings = sweep.of(trial.parameters, trial.seed, trial.model, trial.id).model_copy(update={"run_dir": str(folder)})
    together([settings], 1)
    export(settings)
    return settings


def test_a_sweep_of_points_that_end_in_every_way(tiny_shards, tiny_model, s3, tmp_path):
    """On S3, two trials at half a CPU each, points drawn from a space that is smaller than the budget."""
    sweep = sweep_file.parse(tree(
        s3, tiny_shards, tiny_model, "training.clip=0", "training.schedule=constant", "cluster.cpus_per_worker=0.5",
        search={
            "data.forget.classes": {"choice": [["ant"], ["bee"], ["unicorn"]]},
            "method.alpha": {"choice": [0.25, 1.0], "when": {"data.forget.classes": [["ant"]]}},
            "training.lr": {"choice": [1.0e-3, 1.0e30], "when": {"data.forget.classes": [["bee"]]}},
            "training.warmup_steps": {"same_as": "training.log_every"}, "training.log_every": {"choice": [1]},
        },
        search_by="random", budget={"points": 20}, concurrent=2, constraints=["retain.cosine.drop <= 1"],
        log_to=["tensorboard"],
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
    boards = Storage(s3).files("tensorboard")
    assert all(any(name.startswith(f"tensorboard/{trial.point}/events.") for name in boards) for trial in done)
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

    with pytest.raises(ConfigError, match="holds another sweep: only budget, concurrent, log_to, tracking_uri may"):
        job.prepare(sweep_file.parse(sweep_file.parse(tree(s3, tiny_shards, tiny_model)).model_dump(mode="json")))


@pytest.mark.slow
def test_what_is_killed_goes_on(tiny_shards, tiny_model, tmp_path):
    """The driver while its second trial trains, a worker in the next start; the trials are those of a sweep that
    nothing disturbs."""
    long = [
        "training.steps=120",
        "training.checkpoint_every=20",
        "training.log_every=20",
        "cluster.workers=2",
        "training.micro_batch_size=4",
    ]
    sweep = sweep_file.parse(tree(
        tmp_path / "sweep", tiny_shards, tiny_model, *long, "evaluation.views=[{size: 0.5}]", stop_early="median",
        measure_every=60,
    ))  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(sweep_file.dump(sweep))
    driver = subprocess.Popen([sys.executable, "-m", "unlearn", "sweep", str(path)], stderr=subprocess.PIPE, text=True)
    records, deadline = Trials(Storage(sweep.sweep_dir)), time.monotonic() + 600

    def steps(trial) -> int:
        return (Checkpoints(f"{sweep.sweep_dir}/{trial.run}", 2).steps() or [0])[-1]

    while [t.status for t in records.all() if steps(t)] not in (["done", "running"], ["running", "done"]):
        assert driver.poll() is None and time.monotonic() < deadline, driver.stderr and driver.stderr.read()
        time.sleep(0.05)
    started = [p for p in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in p.name()]
    driver.kill()
    driver.wait()
    psutil.wait_procs(started, timeout=600)
    first, second = sorted(records.all(), key=lambda trial: trial.status)
    assert (first.status, second.status) == ("done", "running")
    saved, killed = steps(second), []

    def kill(now: Progress) -> None:
        row = now.rows.get(second.id)
        if row and not killed:
            mine = psutil.Process().children(recursive=True)
            workers = [p for p in mine if p.is_running() and "RayTrainWorker" in " ".join(p.cmdline() or [p.name()])]
            killed.append(row["step"])
            workers[-1].kill()

    trials = {t.id: t for t in job.sweep(sweep_file.load(str(path)), kill)}
    assert killed and killed[0] > saved, "it goes on from the checkpoint of before the kill"
    assert trials[first.id] == first, "what is done is not run again"
    for number, trial in enumerate(trials.values()):
        settings = sweep.of(trial.parameters, 3, None, trial.id).model_copy(
            update={"run_dir": str(tmp_path / str(number))}
        )
        together([settings], 2)
        expected = Path(export(settings), "weights.safetensors").read_bytes()
        assert (
            trial.status == "done"
            and Path(sweep.sweep_dir, trial.run, "model/weights.safetensors").read_bytes() == expected
        )
        assert [stage["step"] for stage in trial.stages] == [60, 120] and len(
            metrics.read(f"{sweep.sweep_dir}/{trial.run}")
        ) == 6


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """step -> value of what TensorBoard would draw."""

    def told(event: Event):
        return ((event.step, each) for each in event.summary.value)

    found = {}
    for path in folder.glob("events.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, an event, its checksum
            length = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found |= {step: each.simple_value for step, each in told(event) if each.tag == tag}
            at += length + 16
    return found


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine for several sweeps that train nothing. The other one of the file starts its own,
    with the S3 server's variables, and comes first."""
    with connected(config.Cluster(), 1):
        yield


@pytest.fixture
def legs(cluster, monkeypatch) -> list[tuple[str, int]]:
    """(trial, until) of every leg that two slots were given. They train nothing: alpha and seed say what it comes
    to."""
    given = []

    @contextlib.contextmanager
    def two_slots(sweep, desk, scratch):
        def slot(number: int) -> None:
            while (leg := ray.get(desk.next.remote(number))) != "over":
                if leg is None:
                    continue
                run = ray.get(leg.run[0])
                given.append((leg.trial, leg.until))
                drop = run.settings.method.alpha + run.settings.seed / 10
                outcome = {
                    "step": leg.until, "figures": {"retain.cosine.drop": drop, "forget.cosine.drop": 0.5},
                    "original": {}, "oracle": {}, "seconds": {"train": 1.0}, "training_seconds": 1.0,
                }  # fmt: skip
                ray.get(desk.measured.remote(number, leg.trial, outcome))

        with ThreadPoolExecutor() as pool:
            try:
                yield [pool.submit(slot, number) for number in range(2)]
            finally:
                ray.get(desk.close.remote())

    monkeypatch.setattr(job, "_slots", two_slots)
    return given


def test_what_is_worse_is_given_up_early(legs, tiny_shards, tiny_model, tmp_path):
    """Ray Tune's ASHA over four points with two seeds, by slots that train nothing; TensorBoard and, where its client
    is installed, MLflow are told of them."""
    tracked = importlib.util.find_spec("mlflow") is not None
    sweep = sweep_file.parse(tree(
        tmp_path / "sweep", tiny_shards, tiny_model, "training.steps=8",
        search={"method.alpha": {"grid": [1, 2, 3, 4]}}, seeds=[0, 1],
        stop_early="asha", measure_every=2, concurrent=2, log_to=["tensorboard", *["mlflow"] * tracked],
    ))  # fmt: skip
    job.prepare(sweep)
    trials = job.sweep(sweep)
    assert len(legs) == len(set(legs)) and len(trials) == 8
    best = [t for t in trials if t.parameters["method.alpha"] == 1]
    assert [(t.status, t.steps, len(t.stages)) for t in best] == [("done", 8, 4)] * 2
    given_up = [t for t in trials if t.status == "stopped"]
    assert given_up and all(t.steps < 8 and t.message == "stopped early by asha" for t in given_up)
    assert points(best)[0].mean["retain.cosine.drop"] == pytest.approx(1.05)

    before, legs[:] = len(legs), []
    victim = replace(best[0], status="running", stages=best[0].stages[:2], ended="")
    Trials(Storage(sweep.sweep_dir)).write(victim)
    again = job.sweep(sweep)
    assert before > len(trials) and legs == [(victim.id, 6), (victim.id, 8)], (
        "it goes on behind its last stage, and the others are over"
    )
    assert {t.id: t.status for t in again} == {t.id: t.status for t in trials}

    figures = {}
    for name in sorted({trial.point for trial in trials}):
        figures[name] = scalars(Path(sweep.sweep_dir, "tensorboard", name), "ray/tune/retain.cosine.drop")
    [point] = points(best)
    assert figures[point.id] == {step: pytest.approx(1.05) for step in (2, 4, 6, 8)} and len(figures) == 4
    if tracked:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{sweep.sweep_dir}/mlflow.db")
        runs = {
            run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
        }
        assert runs.keys() == figures.keys(), "the points that were shown again are the same runs"
        assert runs[point.id].data.params == {"method.alpha": "1"} and runs[point.id].info.status == "FINISHED"
        history = client.get_metric_history(runs[point.id].info.run_id, "retain.cosine.drop")
        assert {metric.step: metric.value for metric in history} == pytest.approx(figures[point.id])


def test_a_population_that_is_asked_to_stop_goes_on(legs, tiny_shards, tiny_model, tmp_path):
    """In the midst of a stage: `Stopped`, and the next start runs what was not over, and nothing twice."""
    sweep = sweep_file.parse(tree(
        tmp_path / "sweep", tiny_shards, tiny_model, "training.steps=6",
        search={"training.lr": {"uniform": [0.1, 0.2]}},
        search_by="pbt", budget={"points": 4}, measure_every=2, concurrent=2,
    ))  # fmt: skip
    job.prepare(sweep)
    known = Trials(Storage(sweep.sweep_dir))

    def ask(now: Progress) -> None:
        if sum(len(trial.stages) for trial in now.trials) >= 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    signals.listen()
    try:
        with pytest.raises(signals.Stopped):
            job.sweep(sweep, ask)
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    assert 6 <= sum(len(trial.stages) for trial in known.all()) < 12
    assert all(trial.status in ("running", "done") for trial in known.all())
    trials = job.sweep(sweep)
    assert [trial.status for trial in trials] == ["done"] * 4 and trials == known.all()
    assert len(set(legs)) == 12 and len(legs) <= 12 + 2, "at most what two slots had in hand is run again"
    assert [until for _, until in dict.fromkeys(legs)] == [2] * 4 + [4] * 4 + [6] * 4, "all of a stage, then the next"
    origins = [[stage.get("from") for stage in trial.stages] for trial in trials]
    assert origins == [[None] * 3] * 3 + [["p000", "p000", None]]


@pytest.mark.slow
def test_ctrl_c_and_sigterm_of_the_command(tiny_shards, tiny_model, tmp_path):
    """Of `unlearn sweep` while a trial trains: one line says how to go on, no process is left, checkpoints are used."""
    sweep = sweep_file.parse(tree(
        tmp_path / "sweep", tiny_shards, tiny_model, "training.steps=400", "training.checkpoint_every=10",
        "evaluation.views=[{size: 0.5}]",
    ))  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(sweep_file.dump(sweep))
    records, begun = Trials(Storage(sweep.sweep_dir)), 0

    def step() -> int:
        """Steps that are in checkpoints, of all trials."""
        folders = (f"{sweep.sweep_dir}/{trial.run}" for trial in records.all())
        return sum((Checkpoints(folder, 2).steps() or [0])[-1] for folder in folders)

    for sign in (signal.SIGINT, signal.SIGTERM):
        driver = Driver(tmp_path, "sweep", path, RAY_ADDRESS="")
        driver.until(lambda begun=begun: step() > begun)
        left = psutil.Process(driver.process.pid).children(recursive=True)
        line = driver.stopped(sign)
        assert f"what runs goes on from its checkpoints: unlearn sweep {sweep.sweep_dir}" in line
        assert not psutil.wait_procs(left, timeout=60)[1], "processes outlive the driver"
        begun = step()
        assert all(trial.status in ("running", "done") for trial in records.all())
    trials = job.sweep(sweep)
    assert [trial.status for trial in trials] == ["done", "done"]
    for trial in trials:
        rows = [row["step"] for row in metrics.read(f"{sweep.sweep_dir}/{trial.run}")]
        assert rows == [*range(1, 401)], "no step is missing, and none is there twice"


def test_what_cannot_be_logged_to(tiny_shards, tiny_model, tmp_path, monkeypatch, logged):
    def refused(folder=tmp_path, **keys) -> str:
        with pytest.raises(UnlearnError) as e:
            callbacks.wanted(
                sweep_file.parse(tree(folder, tiny_shards, tiny_model, log_to=["mlflow"], **keys)), tmp_path
            )
        return str(e.value)

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "mlflow", None)
        assert "log_to: mlflow needs mlflow-skinny, which is not installed: pip install 'unlearn[mlflow]'" in refused()
    with pytest.raises(ConfigError, match=r"tracking_uri is for log_to: \[mlflow\]"):
        sweep_file.parse(tree(tmp_path, tiny_shards, tiny_model, tracking_uri="http://here"))
    if importlib.util.find_spec("mlflow"):
        assert "SQLite cannot lie in s3://b/c: name an MLflow server in tracking_uri" in refused("s3://b/c")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        told = refused(tracking_uri="http://me:secret@127.0.0.1:9")
        assert "log_to mlflow: http://...: " in told and "NewConnectionError" in told and "secret" not in told
        monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow has set it
        sweep = sweep_file.parse(tree(tmp_path, tiny_shards, tiny_model, log_to=["mlflow"]))
        [runs] = callbacks.wanted(sweep, tmp_path)
        runs.tracking_uri, trial = "http://me:secret@127.0.0.1:9", SimpleNamespace(config={"point": "p000"})
        for _ in range(2):
            runs.log_trial_start(trial)
            runs.log_trial_end(trial)
        [line] = [each.getMessage() for each in logged.records]
        assert line.startswith("nothing more is logged to MLflow: API request to http://.../") and "secret" not in line


def test_a_sweep_is_sent_as_any_job(tiny_shards, tiny_model, tmp_path):
    sweep = sweep_file.parse(
        tree(tmp_path / "sweep", tiny_shards, tiny_model, "cluster.address=10.0.0.1:6379", concurrent=3)
    )
    sent = submit.request(sweep, "sweep", elsewhere=True)
    told = base.settings(sent)
    assert (
        isinstance(told, space.Sweep)
        and told.identity() == sweep.elsewhere().identity()
        and told.cluster.address is None
    )
    assert submit.request(told, "sweep") == sent and sent.command == ["-m", "unlearn", "sweep", sent.source]
    assert submit.request(sweep_file.parse(tree(tmp_path / "sweep", tiny_shards, tiny_model)), "sweep").id != sent.id
    assert {"sweep_dir", "run.data.train", "run.model.weights"} <= told.locations().keys() and not told.names_rows
    one, three = (
        yaml.safe_load(
            submit.backend("k8s", overlay="cpu-demo", image="registry/unlearn:1").plan(submit.request(each, "sweep"))
        )
        for each in (sweep.model_copy(update={"concurrent": 1}), sweep)
    )
    replicas = [each["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] for each in (one, three)]
    assert replicas[0] < replicas[1], "all trials at one time find room"


def test_optuna_knows_after_a_restart_what_it_knew(tiny_shards, tiny_model, tmp_path):
    """Told points are in its study, one that ran is proposed again, and what follows is what would have followed."""
    search = {"method.alpha": {"loguniform": [0.01, 1]}, "data.forget.classes": {"choice": [["ant"], ["bee"]]}}

    def play(folder, restarts: bool) -> list[dict]:
        sweep = sweep_file.parse(tree(
            folder, tiny_shards, tiny_model, search=search, search_by="tpe", budget={"points": 14},
            constraints=["retain.cosine.drop <= 0.5"]
        ))  # fmt: skip
        job.prepare(sweep)
        state = SweepState(sweep, lambda run: None)
        suggestions, proposed = Suggestions(Study(sweep, state, folder), state), []
        for number in range(15):
            given = suggestions.suggest(f"t{number}")
            if given == "FINISHED":
                break
            if restarts and number in (3, 11):  # killed while this point ran: the records say so, and the study
                state = SweepState(sweep, lambda run: None)
                suggestions = Suggestions(Study(sweep, state, folder), state)
                again = suggestions.suggest(f"t{number}")
                assert again == given
            point = given["point"]
            trial = state.trials[f"{point}-s3-m0"]
            alpha = trial.parameters["method.alpha"]
            assert trial.parameters["data.forget.classes"] in (["ant"], ["bee"])
            figures = {"retain.cosine.drop": alpha, "forget.cosine.drop": alpha**0.5}
            state._write(replace(trial, status="done", figures=figures))
            suggestions.on_trial_complete(f"t{number}")
            proposed.append(trial.parameters)
        assert number == 14
        return proposed

    assert play(tmp_path / "disturbed", True) == play(tmp_path / "undisturbed", False)


def test_a_slot_measures_anew_where_a_feature_network_was_replaced(tiny_run, tmp_path, monkeypatch):
    file, met = tmp_path / "inception.safetensors", []
    settings = tiny_run("evaluation.features=inception", f"evaluation.features_weights={file}")
    run, slot = resolve(settings, measured=True), slots.SlotWorker()
    monkeypatch.setattr(measure, "feature_network", lambda settings: object())
    monkeypatch.setattr(measure, "Measurer", lambda run, models, looks, network, kept: met.append(network))
    monkeypatch.setattr(measure, "evaluate", lambda *_, known: met.append(known))
    for content in (b"one", b"one", b"two"):
        file.write_bytes(content)
        slot._measured(run, [])
    assert met[:2] == met[2:4] and met[0] is not met[4] and met[1] is not met[5]
