"""Requests are served in cycles: from the base, all together, old ones apart from new ones, and what fails stays
open."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.cycles import LIMIT, ask, standing
from support.releases import elliptic_keys

from jobs import cycle as job
from unlearn import certificate, config
from unlearn.cycles import history, selecting
from unlearn.cycles.measured import with_parts
from unlearn.cycles.records import Records
from unlearn.data import shards
from unlearn.errors import CycleError
from unlearn.evaluation import comparison
from unlearn.evaluation.comparison import Comparison
from unlearn.ledger import letter, states
from unlearn.ledger.ledger import Ledger
from unlearn.models import weights
from unlearn.releases import figures, pointer, publish, verification
from unlearn.releases.store import Store
from unlearn.run import resolve


def files(cycle, id: str) -> dict[str, str]:
    """The text of what a cycle has left, the weights apart."""
    folder = Path(cycle.cycle_dir, id)
    names = (
        path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml", ".html")
    )
    return {str(path.relative_to(folder)): path.read_text() for path in names}


@pytest.fixture(scope="module")
def served(made):
    """(cycle, what its first run came to, its second, its third): three requests, one of them of nobody; none; one
    more."""
    cycle = made()
    ask(cycle, {"subjects": ["person-1"]}, {"ids": ["img-003", "img-999"]}, {"subjects": ["nobody"]})
    first, second = job.run(cycle), job.run(cycle)
    ask(cycle, {"classes": ["cat"]})
    return cycle, first, second, job.run(cycle)


def test_what_is_open_is_served_and_what_meets_nothing_stays_open(served):
    cycle, first, second, _ = served
    assert (first.selection.unmatched, [(a.number, a.images, a.missing) for a in first.selection.new]) == (
        [3],
        [(1, 10, 0), (2, 1, 1)],
    )
    assert first.outcome.release == "v1" and pointer.read(Store(cycle.releases)).history[0].after == "v1"
    assert (second.selection.status, second.outcome, set(second.seconds)) == ("nothing", None, {"select"})
    assert standing(cycle) == {1: "released", 2: "released", 3: "received", 4: "released"}


def test_every_cycle_starts_from_the_base_with_all_that_was_ever_asked(served):
    cycle, first, _, third = served
    store = Store(cycle.releases)
    one, two = store.release("v1"), store.release("v2")
    base = weights.locate(cycle.base).fingerprint
    assert one.base.weights == two.base.weights == base == third.selection.base and two.parent.version == "v1"
    assert set(one.requests) < set(two.requests) and len(two.requests) == 3
    settings = job.settings(cycle, third.selection, 0)
    assert {"img-001", "img-003", "img-024"} <= set(settings.data.forget.ids) and len(
        settings.data.forget.ids
    ) == 10 + 1 + 12 - 2
    for release, folder in ((one, first.outcome.folder), (two, third.outcome.folder)):
        assert verification.verify(folder, certificate.public_key(cycle.key.replace(".key", ".pub"))) == release


def test_old_requests_are_measured_apart_from_new_ones(served):
    cycle, first, _, third = served
    metrics = [json.loads(files(cycle, e.selection.id)[f"runs/{e.outcome.run}/metrics.json"]) for e in (first, third)]
    assert [list(m["sets"]) for m in metrics] == [
        ["forget", "retain", "forget_new"],
        ["forget", "retain", "forget_new", "forget_old"],
    ]
    assert metrics[1]["sets"]["forget_new"]["classes"] == ["cat"]
    measured = set(metrics[1]["rows"][0]) - {"generator", "set", "view"}
    # What a gate may name, which is checked before anything is measured.
    assert measured == {name for name in figures.FIGURES if not name.startswith("lpips")}


def test_a_part_of_the_forget_set_changes_no_view_of_the_others(served):
    cycle, _, _, third = served
    settings = job.settings(cycle, third.selection, 0)
    views = settings.evaluation.model_copy(update={"views": [config.ViewSpec(kind="random")]})
    run = resolve(settings.model_copy(update={"evaluation": views}), measured=True)
    parts = replace(
        run, measured=run.measured | {"forget_old": run.measured["forget"], "forget_new": run.measured["retain"]}
    )
    one, other = (Comparison(each, comparison.generators(settings)) for each in (run, parts))
    for name in ("forget", "retain"):
        assert one.view(name, 0, np.arange(1)).hidden.equal(other.view(name, 0, np.arange(1)).hidden)
    assert not other.view("forget_old", 0, np.arange(1)).hidden.equal(one.view("forget", 0, np.arange(1)).hidden)


def test_images_of_a_class_that_somebody_names_are_no_retain_images(made, tiny_shards):
    """Requests of several kinds are forgotten by id, and yet held-out images of a class that one of them names are not
    retained."""
    cycle = made()
    cycle = cycle.model_copy(update={"run": cycle.run | {"evaluation": {"data": tiny_shards}}})
    ask(cycle, {"subjects": ["person-1"]}, {"classes": ["cat"]})
    settings = job.settings(cycle, job.select(cycle), 0)
    run = resolve(settings, measured=True)
    with Ledger(cycle.ledger) as ledger:
        parts = with_parts(run, config.Rows(classes=["cat"]), config.Rows(subjects=["person-1"]), ledger.requests())
    assert settings.data.forget.ids and 2 in run.measured["retain"].labels and 2 not in parts.measured["retain"].labels
    assert set(parts.measured["forget_new"].labels) == {2} and len(parts.measured["forget_old"]) == 10


def test_a_rung_is_audited_judged_by_it_and_its_model_signed_twice(made, tmp_path):
    pytest.importorskip("model_signing", reason="pip install 'unlearn[signing]'")
    cycle = made(
        model_key=elliptic_keys(tmp_path)[0],
        audit={"tests": ["transfer"], "limit": 2, "resamples": 100},
        gate={"audit.nothing": {"max": 1.0}},
    )
    ask(cycle, {"subjects": ["person-1"]})
    refused = job.run(cycle)
    assert refused.outcome.due and "no such figure" in str(refused.judgements[0].verdict.reasons[0])
    document = json.loads(files(cycle, refused.selection.id)[f"runs/{refused.judgements[0].run}/audit.json"])
    name = next(name for name in figures.flat({}, document) if "transfer" in name)
    ended = job.run(cycle.model_copy(update={"gate": {name: {"min": -1e9}}}))
    assert ended.outcome.release == "v1" and {"audit.json", "model.sig"} <= set(
        Store(cycle.releases).release("v1").files
    )
    again = json.loads(files(cycle, refused.selection.id)[f"runs/{refused.judgements[0].run}/audit.json"])
    assert again == document, "it is not audited twice"


def test_all_of_it_on_s3(cycle, s3):
    cycle = cycle.model_copy(
        update={"cycle_dir": f"{s3}/cycles", "releases": f"{s3}/store", "delete_rows": f"{s3}/kept"}
    )
    ask(cycle, {"subjects": ["person-1"]})
    ended = job.run(cycle)
    assert ended.outcome.folder.startswith(f"{s3}/store/v1-") and standing(cycle) == {1: "released"}
    assert [told.ended for told in history.of(Records(cycle.cycle_dir))] == ["v1, made current"]
    again = job.release(cycle, ended.selection, 0)
    assert again == ended.outcome and shards.load(ended.outcome.rows.uri).rows == 38


def test_the_ledger_and_the_letter_tell_what_was_done(served):
    cycle, first, _, _ = served
    with Ledger(cycle.ledger) as ledger:
        events = [(step["event"], step.get("evidence", {})) for step in ledger.history(1)]
        text = letter.write(ledger, 1)
    assert [event for event, _ in events] == ["received", "scheduled", "trained", "verified", "released"]
    assert all(evidence["cycle"] == first.selection.id for _, evidence in events[1:])
    assert events[3][1]["gate"] == "passed" and events[4][1] == {
        "cycle": first.selection.id, "release": "v1", "weights": first.outcome.weights, "current": True,
        "images": 10, "missing": 0,
    }  # fmt: skip
    assert "release: v1" in text and first.outcome.weights in text
    assert "found and are to be forgotten: 10\n" in text and "Not all" not in text and "replaced the one before" in text


def test_the_letter_tells_what_was_not_found_and_that_the_model_is_not_current(served, made):
    cycle, _, _, _ = served
    with Ledger(cycle.ledger) as ledger:
        text = letter.write(ledger, 2)
    assert "to be forgotten: 1\n" in text and "Not all that you named was found: 1 of it has no image" in text
    cycle = made(promote=False)
    ask(cycle, {"subjects": ["person-1"]})
    job.run(cycle)
    with Ledger(cycle.ledger) as ledger:
        text = letter.write(ledger, 1)
    assert "the one before was still the current one" in text and "replaced the one before" not in text


def test_names_are_in_the_configuration_of_the_run_alone(served):
    cycle, first, _, third = served
    for ended in (first, third):
        for name, text in files(cycle, ended.selection.id).items():
            named = any(word in text for word in ("person-1", "img-0", "img-9", "nobody"))
            assert named == (name == f"runs/{ended.outcome.run}/config.yaml"), name
    config_file = Path(cycle.cycle_dir, first.selection.id, "runs", first.outcome.run, "config.yaml")
    assert config_file.stat().st_mode & 0o077 == 0 and config.load(config_file).data.forget.ids


def test_the_ladder_is_climbed_and_every_rung_recorded(made):
    """The first rung does not learn at all, the second does; after both fail the same requests are tried again only
    under another gate."""
    gate = {"metrics.unlearned.forget.psnr": {"base": {"max": -1e-3}}, LIMIT: {"min": 1.5}}
    cycle = made(gate=gate, ladder=[{"training.lr": 0.3, "training.steps": 3}])
    cycle = cycle.model_copy(update={"run": cycle.run | {"training": cycle.run["training"] | {"lr": 1e-30}}})
    ask(cycle, {"subjects": ["person-1"]})
    due = job.run(cycle)
    assert due.outcome.due and [j.passed for j in due.judgements] == [False, False]
    assert standing(cycle) == {1: "received"} and not Store(cycle.releases).releases()
    assert (
        (again := job.run(cycle)).selection.status == "due"
        and again.outcome == due.outcome
        and set(again.seconds) == {"select"}
    )

    eased = cycle.model_copy(update={"gate": {"metrics.unlearned.forget.psnr": gate["metrics.unlearned.forget.psnr"]}})
    before = {name: text for name, text in files(cycle, due.selection.id).items() if "metrics" in name}
    ended = job.run(eased)
    assert [j.passed for j in ended.judgements] == [False, True] and ended.outcome.rung == 1
    assert ended.selection.id == due.selection.id, "the same cycle goes on"
    assert before.items() <= files(cycle, due.selection.id).items(), "nothing was trained or measured again"
    assert len(Records(cycle.cycle_dir).judgements(due.selection.id)) == 4 and standing(cycle) == {1: "released"}


def test_a_request_that_comes_or_goes_meanwhile_does_not_disturb(cycle):
    first, second = ask(cycle, {"subjects": ["person-1"]}, {"subjects": ["person-2"]})
    selection = job.select(cycle)
    (late,) = ask(cycle, {"classes": ["dog"]})
    with Ledger(cycle.ledger) as ledger:
        ledger.advance(second, states.WITHDRAWN)
    ended = job.run(cycle)
    assert ended.selection == selection and ended.outcome.release == "v1"
    release = Store(cycle.releases).release("v1")
    assert release.requests == [asked.commitment for asked in selection.new if asked.number == first]
    assert standing(cycle) == {first: "released", second: "withdrawn", late: "received"}
    following = job.select(cycle)
    assert [a.number for a in following.new] == [late] and [a.number for a in following.old] == [first]


def test_a_release_that_would_keep_the_next_one_from_being_current_is_told_before_anything_is_trained(cycle):
    ask(cycle, {"subjects": ["person-1"]})
    ended = job.run(cycle)
    store, stray = Store(cycle.releases), "f" * 64
    run = Records(cycle.cycle_dir).run_folder(ended.selection.id, ended.outcome.run)
    serves = [*store.release("v1").requests, stray]
    publish.publish(run, store, certificate.private_key(cycle.key), serves)
    ask(cycle, {"subjects": ["person-2"]})
    with pytest.raises(CycleError, match=f"v2 in .* serves 1 .*{stray[:16]}.*`unlearn release withdraw v2 --store"):
        job.run(cycle)
    assert standing(cycle)[2] == "received"
    assert job.select(cycle.model_copy(update={"promote": False})).status == "selected"
    with pytest.raises(CycleError, match="could not become current"):
        job.select(cycle)  # which was begun
    pointer.promote(store, "v2")
    with pytest.raises(CycleError, match="promote=false, and then `unlearn release promote`"):
        job.select(cycle)
    assert job.select(cycle.model_copy(update={"promote": False})).status == "selected"


def test_a_base_that_was_unlearned_is_refused(cycle):
    ask(cycle, {"subjects": ["person-1"]})
    released = f"{job.run(cycle).outcome.folder}/model"
    ask(cycle, {"subjects": ["person-2"]})
    with pytest.raises(CycleError, match="its model.json says that it was unlearned"):
        job.select(cycle.model_copy(update={"run": cycle.run | {"model": {"weights": released}}}))
    assert standing(cycle)[2] == "received"


def test_a_cycle_whose_base_was_changed_is_begun_anew(cycle, tmp_path, logged):
    ask(cycle, {"subjects": ["person-1"]})
    before = job.select(cycle)
    other = str(tmp_path / "other")
    model = config.Model(weights=cycle.base)
    weights.write(weights.build(model).requires_grad_(False).apply(_shifted), other, {})
    changed = cycle.model_copy(update={"run": cycle.run | {"model": {"weights": other}}})
    with pytest.raises(CycleError, match="the base was changed"):
        job.train(changed, before, 0)
    after = job.select(changed)
    assert f"{other} is another base ({after.base[:16]}) than that of cycle {before.id}" in logged.text
    assert after.id != before.id and [a.number for a in after.new] == [1]
    with Ledger(cycle.ledger) as ledger:
        assert [s["event"] for s in ledger.history(1)] == ["received", "scheduled", "received", "scheduled"]


def _shifted(module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.add_(0.01)


def test_a_cycle_of_another_folder_is_taken_over_with_a_warning(cycle, made, logged):
    ask(cycle, {"subjects": ["person-1"]})
    began = job.select(cycle)
    moved = cycle.model_copy(update={"cycle_dir": cycle.cycle_dir + "-moved"})
    assert job.select(moved).id == began.id and "has no such cycle" in logged.text


def test_the_id_is_of_what_is_asked_the_base_and_the_data_alone(cycle):
    ask(cycle, {"subjects": ["person-1"]})
    selection = job.select(cycle)
    assert (
        selecting.identity(selection)
        == selection.id
        == selecting.identity(selection.model_copy(update={"at": "x", "unmatched": [9]}))
    )
    for change in ({"base": "b"}, {"data": "d"}, {"old": selection.new}, {"new": []}):
        assert selecting.identity(selection.model_copy(update=change)) != selection.id
