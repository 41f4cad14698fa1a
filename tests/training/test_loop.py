"""The worker's loop: learning rate, length of a run, the rehearsal, repeatability, what it logs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import export, worker

from unlearn import config
from unlearn.data.loader import Loader
from unlearn.methods import base as methods
from unlearn.models import weights
from unlearn.run import resolve
from unlearn.training import loop, metrics
from unlearn.training.checkpoint import Checkpoints
from unlearn.training.engine import Objective, TorchEngine


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = config.Training(steps=10, lr=1.0, warmup_steps=4)
    rates = [loop.learning_rate(settings, step, 10) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[7] == pytest.approx(0.5) and rates[10] == pytest.approx(0)
    constant = config.Training(steps=10, lr=1.0, warmup_steps=4, schedule="constant")
    assert loop.learning_rate(constant, 9, 10) == 1.0


def test_an_epoch_is_a_pass_over_the_set_that_takes_longest(tiny_run):
    """36 retain rows, 12 forget rows; batches of 4 + 4, or of 2 + 6."""
    for fraction, expected in ((0.5, 2 * 36 / 4), (0.75, 2 * 36 / 2)):
        run = tiny_run("training.steps=null", "training.epochs=2", f"training.forget_fraction={fraction}")
        assert resolve(run).steps == expected
    assert resolve(tiny_run("training.steps=7")).steps == 7


def test_the_rehearsal_leaves_no_trace(tiny_run):
    """Weights, moments and step count are after it what they were before."""
    run = tiny_run()
    method, student = methods.create(run.method), weights.build(run.model, run.seed)
    before = {n: p.clone() for n, p in student.named_parameters()}
    engine = TorchEngine(
        Objective(student, method, weights.build(run.model)),
        method.trainable(student),
        run.training,
        torch.device("cpu"),
    )
    loop._dry_run_step(engine, Loader(run, resolve(run).sets, student.grid, student.options.image_size), run)
    assert all(torch.equal(before[n], p) for n, p in student.named_parameters())
    for fragment in engine.fragments():
        assert not fragment.state("exp_avg").any() and not fragment.state("exp_avg_sq").any()
        assert engine.optimizer.state[fragment.flat]["step"] == 0


def test_equal_seeds_give_equal_weights_and_others_do_not(tiny_run, tmp_path):
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run = tiny_run(f"seed={seed}", f"run_dir={tmp_path}/{name}")
        worker(run)
        found.append(Path(export(run), "weights.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_the_decoder_is_not_on_the_device(tiny_run, monkeypatch):
    """Neither the student's nor the teacher's, unless the method needs it."""
    seen, real = [], TorchEngine.__init__

    def watch(self, objective, *arguments):
        seen.append((objective.student.decoder, objective.teacher and objective.teacher.decoder))
        real(self, objective, *arguments)

    monkeypatch.setattr(TorchEngine, "__init__", watch)
    worker(tiny_run())
    assert seen.pop() == (None, None)
    worker(tiny_run("method.name=pretrain", "run_dir=" + tiny_run().run_dir + "-2"))
    assert seen.pop()[0] is not None


def test_every_row_says_how_the_run_does(tiny_run):
    run = tiny_run("training.log_every=2", "training.steps=5")
    told = []
    worker(run, told.append)
    rows = metrics.read(run.run_dir)
    assert rows == told and [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert row["loss"] == pytest.approx(row["retain"] + run.method.alpha * row["forget"], rel=1e-5)
        assert row["images_per_s"] > 0 and row["flop_per_s"] > 0 and row["peak_memory_gib"] > 0 and row["steps"] == 5
    assert list(Path(run.run_dir, "tensorboard").glob("events.*"))


def test_the_export_says_what_it_is_and_is_no_pickle(tiny_run):
    run = tiny_run()
    worker(run)
    folder = Path(export(run))
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "weights.safetensors"]
    _, card = weights.read(str(folder))
    assert (
        card["config_hash"] == run.hash()
        and card["step"] == 4
        and card["samples"] == 32
        and card["from"] == run.model.weights
    )
    state = Checkpoints(run.run_dir, 2).state(4)
    assert card["data"] == state.data
    assert load_file(folder / "weights.safetensors").keys() == weights.build(run.model).state_dict().keys()
