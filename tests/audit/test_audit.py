"""An audit from end to end on the embedded images: what it writes, that it resumes, that workers change nothing."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs import audit as job
from unlearn import config
from unlearn.audit import settings as audits
from unlearn.audit.bench import Bench, Benches, Kept
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, UnlearnError
from unlearn.evaluation import measure
from unlearn.models import weights
from unlearn.releases import figures, gate
from unlearn.run import resolve

ORIGINAL, ORACLE = "embedded:mae-fashion", "embedded:mae-fashion-oracle"
QUICK = ["limit=40", "resamples=100", "membership.views=2"]


def make_run(folder, unlearned: str = ORIGINAL, **evaluation) -> config.RunConfig:
    """The demo's run, whose unlearned model is the one given."""
    tree = {
        "run_dir": str(folder / "run"), "model": {"weights": ORIGINAL},
        "data": {"train": "embedded:fashion-train",
            "forget": {"classes": ["Trouser", "Sandal", "Sneaker", "Bag", "Ankle boot"]}},
        "training": {"engine": "torch", "steps": 1},
        "evaluation": {"data": "embedded:fashion-test", "oracle": ORACLE} | evaluation,
    }  # fmt: skip
    settings = config.parse(tree)
    weights.write(weights.build(config.Model(weights=unlearned)), str(folder / "run" / "model"), {})
    return settings


def audited(settings: config.RunConfig, *overrides: str, **arguments) -> dict:
    return job.audit(resolve(settings, measured=True), audits.load(None, [*QUICK, *overrides]), **arguments)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(run, audit.json of an original that claims to have forgotten)."""
    settings = make_run(tmp_path_factory.mktemp("audited"))
    return settings, audited(settings, "tests=[membership]")


def test_audit_json_says_what_was_audited(done):
    settings, document = done
    folder = Storage(settings.run_dir)
    assert json.loads(folder.read("audit.json")) == document
    assert document["weights"]["unlearned"] == weights.card(Storage(folder.where("model")))["sha256"]
    assert list(document["weights"]) == ["original", "unlearned", "oracle"]
    assert document["config_hash"] == settings.hash() and document["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    assert document["reasons"][-1] == "Not made: Transfer, Probes, Relearning, Streisand check"
    row = document["membership"]["unlearned"]
    assert row == document["membership"]["original"] and row["auc_low"] <= row["auc"] <= row["auc_high"]
    assert {name: s["images"] for name, s in document["sets"].items()} == dict.fromkeys(
        ("forget", "forget_new", "retain", "retain_new", "unseen"), 40
    )


def test_a_gate_refers_to_its_figures(done):
    _, document = done
    rules = gate.parse(
        {
            "audit.counts.failed": {"max": 1},
            "audit.membership.unlearned.auc": {"max": 0.9, "oracle": {"min": -1, "max": 1}},
        }
    )
    assert gate.judge(rules, ({}, document), None).passed
    assert figures.flat({}, document)["audit.membership.oracle.auc"] == document["membership"]["oracle"]["auc"]


def test_membership_is_the_auc_of_the_errors(done):
    """Against errors computed here, image by image."""
    settings, document = done
    run = resolve(settings, measured=True)
    subject = job.prepared(run, audits.load(None, [*QUICK, "tests=[membership]"]))
    bench = Bench(subject)
    scores = {}
    for name in ("forget", "forget_new"):
        errors = []
        kept, pixels = bench.pixels(name, 0, 40)
        model = weights.build(config.Model(weights=ORIGINAL))
        for number in range(2):
            view = bench.view(config.ViewSpec(kind="random", size=0.5), number, name, kept)
            with torch.no_grad():
                made = model.denormalise(model.reconstruct(model.normalise(pixels), view)).double().numpy()
            hidden = np.broadcast_to(view.pixel_mask(32).numpy(), made.shape)
            squares = np.where(hidden, (made - pixels.numpy() / 255) ** 2, 0)
            errors.append(squares.sum((1, 2, 3)) / hidden.sum((1, 2, 3)))
        scores[name] = -np.mean(errors, 0)
    expected = np.mean(scores["forget"][:, None] > scores["forget_new"][None])
    assert document["membership"]["original"]["auc"] == pytest.approx(expected, abs=1e-6)


def test_what_is_done_is_not_done_again(done, tmp_path, monkeypatch):
    settings, document = done
    shutil.copytree(settings.run_dir, tmp_path / "run")
    moved = settings.model_copy(update={"run_dir": str(tmp_path / "run")})
    pieces = sorted(os.listdir(tmp_path / "run/audit"))
    os.remove(tmp_path / "run/audit" / pieces[0])
    calls = []
    measure = Bench.__call__
    monkeypatch.setattr(Bench, "__call__", lambda self, piece: calls.append(piece) or measure(self, piece))
    assert audited(moved, "tests=[membership]")["membership"] == document["membership"]
    assert len(calls) == 1
    assert audited(moved, "tests=[membership]", "membership.views=1")["membership"] != document["membership"]
    assert len(calls) == 7, "other options are another measurement"
    (tmp_path / "run/audit" / pieces[1]).write_bytes(b"PK damaged")
    with pytest.raises(UnlearnError, match="is damaged"):
        audited(moved, "tests=[membership]")


def test_figures_do_not_depend_on_who_measures_what(done):
    settings, _ = done
    subject = job.prepared(
        resolve(settings, measured=True), audits.load(None, [*QUICK, "tests=[membership]", "batch_size=15"])
    )
    pieces = subject.tests["membership"].pieces(subject)
    one, other = Bench(subject), Bench(subject)
    first = [one(piece)["errors"] for piece in pieces]
    second = [(one, other)[i % 2](piece)["errors"] for i, piece in reversed(list(enumerate(pieces)))][::-1]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    others = job.prepared(resolve(settings, measured=True), audits.load(None, ["limit=30", "tests=[membership]"]))
    worker = Benches()
    worker(others.tests["membership"].pieces(others)[0], others)
    assert (worker(pieces[-1], subject)["errors"] == first[-1]).all(), "whatever it has audited before"


def test_what_was_measured_of_another_run_is_not_taken_where_training_would_be_other(done):
    settings, _ = done
    other = settings.model_copy(update={"train_views": [config.ViewSpec(size=0.25)]})
    made = [
        job.prepared(resolve(s, measured=True), audits.load(None, ["tests=[membership,relearning]"]))
        for s in (settings, other)
    ]
    keys = {name: {s.key(s.tests[name].pieces(s)[0]) for s in made} for name in made[0].tests}
    assert {name: len(known) for name, known in keys.items()} == {"membership": 1, "relearning": 2}


def test_a_feature_network_of_other_weights_looks_anew(tmp_path, monkeypatch):
    file = tmp_path / "inception.safetensors"
    file.write_bytes(b"one")
    settings, kept, keys, networks = make_run(tmp_path), Kept(), [], []
    evaluation = settings.evaluation.model_copy(update={"features": "inception", "features_weights": str(file)})
    run = resolve(settings.model_copy(update={"evaluation": evaluation}), measured=True)
    monkeypatch.setattr(measure, "feature_network", lambda settings: torch.nn.Identity())
    for content in (b"one", b"one", b"two"):
        file.write_bytes(content)
        subject = job.prepared(run, audits.load(None, [*QUICK, "tests=[membership,probes]"]))
        pieces = [piece for test in subject.tests.values() for piece in test.pieces(subject)]
        keys.append({piece: subject.key(piece) for piece in pieces} | {"all": subject.identity()})
        networks.append(kept.network(subject))
    assert keys[0] == keys[1] and networks[0] is networks[1] is not networks[2]
    other = {piece if piece == "all" else piece.what for piece in keys[2] if keys[2][piece] != keys[1][piece]}
    assert other == {"all", "retrieval", "gallery"}


def test_images_of_the_next_audit_are_kept_decoded_where_those_before_were_let_go(tmp_path):
    settings, kept = make_run(tmp_path), Kept()
    data = settings.data.model_copy(update={"cache": "decoded", "cache_bytes": 400_000})
    run = resolve(settings.model_copy(update={"data": data}), measured=True)
    for seed in range(3):
        subject = job.prepared(run, audits.load(None, [*QUICK, f"seed={seed}"]))
        bench = Bench(subject, kept)
        for name in ("forget", "retain"):
            bench.pixels(name, 0, 40)
        assert kept.images(subject).decoded > 40 * 3 * 32**2


@pytest.mark.slow
def test_two_ray_workers_give_the_figures_of_one_process(done):
    """Its quick companion is test_figures_do_not_depend_on_who_measures_what."""
    settings, document = done
    assert audited(settings, "tests=[membership]", "workers=2", again=True)["membership"] == document["membership"]


def test_that_nothing_was_damaged_is_no_pass(tmp_path):
    """Of the original, which has forgotten nothing; without an oracle, what it still knows is compared with nothing."""
    document = audited(make_run(tmp_path, oracle=None), "tests=[transfer]", "transfer.bystanders=1")
    assert document["verdict"] == document["transfer"]["verdict"] == "NOT SHOWN"
    assert "bystanders" in document["transfer"]["reasons"][-1] and "within" in document["transfer"]["reasons"][-1]
    document = audited(make_run(tmp_path), "tests=[streisand]", "streisand.margin=0.11")
    assert document["streisand"]["verdict"] == "PASS" and document["verdict"] == "NOT SHOWN", "it asks for damage alone"


def test_one_forgotten_image_is_too_few_to_judge_by_and_no_failure(tmp_path):
    settings = make_run(tmp_path)
    one = resolve(settings, measured=True).sets["forget"].manifest.table(["id"], [0])["id"].to_pylist()[:1]
    data = settings.data.model_copy(update={"forget": config.Rows(ids=one)})
    wanted = ["tests=[probes,relearning,streisand]", "probes.steps=1", "relearning.steps=1", "relearning.on=[forget]"]
    document = audited(settings.model_copy(update={"data": data}), *wanted)
    told = "\n".join(reason for name in document["tests"] for reason in document[name]["reasons"])
    assert told.count("it rests on 1 image, and an interval takes 10") == 5 and "it takes two forget images" in told
    assert document["streisand"]["verdict"] == document["probes"]["verdict"] == "NOT SHOWN"


def test_parts_of_a_set_have_all_of_its_classes(tmp_path):
    """The embedded shards hold one class after another."""
    subject = job.prepared(resolve(make_run(tmp_path), measured=True), audits.load(None, ["limit=200"]))
    for name in ("forget", "forget_new"):
        assert (np.diff(subject.labels(name)) >= 0).all()
        positions = subject.shuffled(name)
        assert sorted(positions) == list(range(200))
        for start in range(0, 192, 32):
            assert len(set(subject.labels(name)[positions[start : start + 32]].tolist())) == 5
    bench = Bench(subject)
    kept, pixels = bench.some("forget", 3, 9)
    assert kept.tolist() == subject.shuffled("forget")[3:9].tolist()
    assert torch.equal(pixels[2], bench.pixels("forget", kept[2], kept[2] + 1)[1][0])


def test_classes_are_compared_by_name(tmp_path):
    """Held-out shards that lack one class number the others otherwise."""
    run = resolve(make_run(tmp_path), measured=True)
    subject = job.prepared(run, audits.load(None, QUICK))
    rows, expected = subject.sets["forget_new"], subject.labels("forget_new")
    names = run.sets["forget"].manifest.classes
    assert rows.manifest.classes == names and 0 not in expected
    shifted = replace(rows.manifest, classes=[*names[1:], "Hat"])
    subject.sets["forget_new"] = replace(rows, manifest=shifted, labels=rows.labels - 1)
    assert (subject.labels("forget_new") == expected).all()
    strange = replace(rows, manifest=shifted, labels=np.full(len(rows), 9))
    subject.sets["forget_new"] = strange
    assert (subject.labels("forget_new") >= 10).all(), "a class that training has not is none of its classes"
    assert not subject.same_classes
    subject.sets["retain_new"] = strange
    assert subject.same_classes
    probes = subject.tests["probes"]
    measured = {(g, s): {"labels": np.zeros(4), "embeddings": np.eye(4)} for g in subject.models for s in subject.sets}
    measured |= {(g, w): {"features": np.eye(4)} for g in subject.models for w in ("retrieval", "gallery")}
    asked = {figure.name: figure for figure in probes.figures(measured, subject)}
    assert "same classes on both sides" in asked["forget_or_not"].absent


def test_unseen_images_are_of_classes_that_training_has_not(tmp_path):
    run = resolve(make_run(tmp_path), measured=True)
    with pytest.raises(ConfigError, match="unseen: .* only classes that are in training data too"):
        job.prepared(run, audits.load(None, [*QUICK, "unseen=embedded:fashion-test"]))


def test_an_oracle_is_a_model_of_its_own(tmp_path):
    itself = str(tmp_path / "run/model")
    for oracle, message in (
        (ORIGINAL, "holds the weights of the original"), ([ORACLE, ORACLE], "of the oracle;"),
        (itself, "of the unlearned;"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            audited(make_run(tmp_path, oracle=oracle), "tests=[transfer]")


def test_without_held_out_images_nothing_is_shown(tmp_path):
    document = audited(make_run(tmp_path, data=None), "tests=[membership]")
    assert document["verdict"] == document["membership"]["verdict"] == "NOT SHOWN"
    assert "evaluation.data" in document["membership"]["reasons"][0]
    assert document["membership"]["open"], "so no other test makes a PASS of the whole"


def test_an_oracle_of_other_images_is_told_and_nothing_passes_by_it():
    judged = {"transfer": {"title": "Transfer", "verdict": "PASS", "open": False, "trace": True}}
    assert job._verdict(judged, ["transfer"], [])["verdict"] == "PASS"
    doubted = job._verdict(judged, ["transfer"], ["that oracle"])
    assert doubted["verdict"] == "NOT SHOWN" and doubted["reasons"][-1] == "that oracle"
    judged["transfer"]["verdict"] = "FAIL"
    assert job._verdict(judged, ["transfer"], ["that oracle"])["verdict"] == "FAIL"


def test_single_images_are_compared_with_as_many_of_each_class(tmp_path):
    """Nine trousers and one boot were chosen; held-out images are of both classes alike."""
    settings = make_run(tmp_path)
    whole = resolve(settings, measured=True).sets["forget"]
    table = whole.manifest.table(["id", "label"])
    named = list(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    ids = {label: [id for id, own in named if own == label] for label in (1, 9)}
    data = settings.data.model_copy(update={"forget": config.Rows(ids=[*ids[1][:9], ids[9][0]])})
    subject = job.prepared(resolve(settings.model_copy(update={"data": data}), measured=True), audits.load(None, QUICK))
    assert subject.same_classes
    rows = subject.alike({name: np.arange(len(subject.sets[name])) for name in ("forget", "forget_new")})
    labels = subject.labels("forget_new")[rows["forget_new"]]
    assert len(rows["forget"]) == 10 and (labels == 1).sum() == 9 * (labels == 9).sum() > 0
    subject = job.prepared(resolve(settings, measured=True), audits.load(None, QUICK))
    rows = subject.alike({name: np.arange(len(subject.sets[name])) for name in ("forget", "forget_new")})
    assert all(len(rows[name]) == len(subject.sets[name]) for name in rows), "of whole classes all are compared"


def test_a_run_without_a_model_is_told(tmp_path):
    settings = make_run(tmp_path)
    Storage(settings.run_dir).delete("model")
    with pytest.raises(UnlearnError, match="nothing to audit"):
        audited(settings)


def test_what_is_audited_travels_to_workers(done):
    subject = job.prepared(resolve(done[0], measured=True), audits.load(None, QUICK))
    there = pickle.loads(pickle.dumps(subject))
    piece = subject.tests["membership"].pieces(subject)[0]
    assert there.settings == subject.settings and there.key(piece) == subject.key(piece)


def test_mistakes_in_an_audit_are_told():
    with pytest.raises(ConfigError, match="membership.vews: unknown key; did you mean views"):
        audits.parse({"membership": {"vews": 3}})
    with pytest.raises(ConfigError, match="no test 'membershop'; known: membership"):
        audits.parse({"tests": ["membershop"]})


def test_what_is_damaged_of_an_audit_is_told():
    whole = job._packed({"errors": np.arange(600.0)})
    assert job._unpacked(whole, "there")["errors"].tolist() == list(range(600))
    changed = bytearray(whole)
    changed[60] ^= 255
    for damaged in (b"", b"x" * 90, whole[:-30], whole[: len(whole) // 2], bytes(changed)):
        with pytest.raises(UnlearnError, match=r"there is damaged \(\w+\): delete it, and audit again"):
            job._unpacked(damaged, "there")
