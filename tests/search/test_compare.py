"""Comparisons: fair and whole before anything starts, the settings that each method gets, the table and its page."""

import io
import itertools
import json
import math
from pathlib import Path

import pytest
from support.browser import CHROMIUM, browser
from support.sweeps import trial

from jobs import audit as audits
from jobs import compare as job
from jobs import compare_audits
from unlearn import config
from unlearn import run as runs
from unlearn.audit import page
from unlearn.audit import settings as audit_settings
from unlearn.audit import subject as subjects
from unlearn.audit.bench import Bench
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, StorageError, UnlearnError, WorkerDied
from unlearn.models import weights
from unlearn.search import compare as comparisons
from unlearn.search import labels, leaderboard, leaderboard_page
from unlearn.search.records import Trials

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "jobs/configs").glob("compare_*.yaml"))


def tree(folder, **changes) -> dict:
    return {
        "name": "few", "compare_dir": str(folder), "run": str(ROOT / "jobs/configs/demo_fashion.yaml"),
        "set": {"cluster.workers": 1, "evaluation.limit": 30},
        "methods": {
            "paper": {"method": {"name": "encoder_l2"}, "tune": {"method.alpha": [0.1, 1.0]}},
            "decoupling": {"method": {"name": "decoupling"}, "set": {"training.clip": 1.0},
                "tune": {"method.threshold": [0.1, 1.0]}},
        },
        "tune": {"common": {"training.lr": [1e-4, 1e-3]}, "limit": 7}, "seeds": [0, 5],
        "originals": [{"weights": "/a", "oracles": ["/a1", "/a2"]}, {"weights": "/b", "oracles": ["/b1", "/b2"]}],
    } | changes  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_comparison_has_a_valid_run_for_every_setting(path):
    found = comparisons.load(str(path))
    assert len(found.methods) > 8 and len(found.seeds) == 3
    chosen = {label: found.candidates(label)[-1] for label in found.methods}
    for stage in (found.tuning(), found.final(chosen)):
        runs = [stage.of(point, seed, model, "x") for point in stage.grid() for seed, model in stage.pairs()]
        assert len({(run.hash(), run.model.weights) for run in runs}) == len(runs)


def test_tuning_and_the_runs_that_are_compared(tmp_path):
    found = comparisons.parse(tree(tmp_path))
    tuning = found.tuning()
    assert tuning.size == 8 and tuning.pairs() == [(0, "/a")]
    run = tuning.of(tuning.grid()[-1], 0, "/a", "x")
    assert (run.method.name, run.method.threshold, run.training.lr, run.training.clip) == ("decoupling", 1.0, 1e-3, 1.0)
    assert (run.evaluation.data, run.evaluation.limit) == ("embedded:fashion-train", 7), "chosen on training images"
    final = found.final({label: found.candidates(label)[0] for label in found.methods})
    assert final.size == 2 and final.pairs() == [(0, "/a"), (0, "/b"), (5, "/a"), (5, "/b")]
    runs = {model: final.of(final.grid()[0], 5, model, "x") for model in ("/a", "/b")}
    assert runs["/a"].evaluation.oracles == ["/a1", "/a2"] and runs["/b"].evaluation.oracles == ["/b1", "/b2"]
    assert (runs["/b"].evaluation.data, runs["/b"].evaluation.limit) == ("embedded:fashion-test", 30)
    assert runs["/b"].model.weights == "/b" and runs["/b"].method.alpha == 0.1
    again = comparisons.parse(comparisons.config.yaml_tree(comparisons.dump(found), "x"))
    assert again.identity() == found.identity() != comparisons.parse(tree(tmp_path, seeds=[1])).identity()


def test_what_is_not_fair_or_not_valid_is_refused(tmp_path):
    methods = tree(tmp_path)["methods"]
    for changes, message in (
        (
            {"methods": methods | {"more": {"method": {"name": "max_loss"}, "tune": {"method.alpha": [1, 2, 3]}}}},
            "as many settings as the others.*more 6",
        ),
        (
            {
                "methods": methods
                | {"bad": {"method": {"name": "max_loss", "beta": 1}, "tune": {"method.alpha": [1, 2]}}}
            },
            "methods.bad: .*beta: unknown key",
        ),
        ({"methods": {"plain": {"method": {"name": "pretrain"}}}}, "plain: pretrain forgets nothing"),
        ({"tune": {"choose": ["forget.charm"]}}, "no figure 'forget.charm'"),
        ({"speed": 1}, "speed: unknown key"),
        ({"seeds": [3, 3]}, "seeds: .*3 is there twice"),
        ({"originals": [{"weights": "/a"}, {"weights": "/a"}]}, "originals: .*/a is there twice"),
        (
            {"originals": [{"weights": "/a", "oracles": ["/1", "/2"]}, {"weights": "/b", "oracles": ["/3"]}]},
            "originals: .*cannot be averaged",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            comparisons.parse(tree(tmp_path, **changes))
    found = comparisons.parse(
        tree(tmp_path, methods={"far": {"method": {"name": "encoder_l2", "target": "background"}}})
    )
    with pytest.raises(ConfigError, match="methods.far: method.target background"):
        job.prepare(found)
    assert not list(tmp_path.iterdir())
    job.prepare(comparisons.parse(tree(tmp_path)))
    job.prepare(comparisons.parse(tree(tmp_path, concurrent=2, audit={"tests": ["transfer"]})))
    with pytest.raises(ConfigError, match="no test 'charm'"):
        job.prepare(comparisons.parse(tree(tmp_path, audit={"tests": ["charm"]})))
    with pytest.raises(ConfigError, match="holds another comparison"):
        job.prepare(comparisons.parse(tree(tmp_path, seeds=[1])))
    with pytest.raises(UnlearnError, match="no run with the settings chosen is done"):
        job.report(comparisons.parse(tree(tmp_path)))


@pytest.fixture
def compared(tmp_path) -> comparisons.Compare:
    """The folder of a comparison whose runs are over: the better setting of each method is its second; one run has
    failed."""
    found = comparisons.parse(tree(tmp_path, tune={}))
    tuning, known = found.tuning(), Trials(Storage(found.tuning().sweep_dir))
    for number, point in enumerate(tuning.grid()):
        good = number % 2 == 1
        known.write(trial(f"p{number:03d}", 0, point, 0.6 if good else 0.5, 0.775))
    final = found.final({label: found.candidates(label)[1] for label in found.methods})
    known, folder = Trials(Storage(final.sweep_dir)), Storage(final.sweep_dir)
    for number, point in enumerate(final.grid()):
        for place, (seed, model) in enumerate(final.pairs()):
            id = final.trial_id(f"p{number:03d}", seed, model)
            failed = (
                {"status": "failed", "message": "the loss is not finite", "figures": {}}
                if (number, place) == (0, 3)
                else {}
            )
            made = trial(
                f"p{number:03d}", seed, point, 0.6, 0.77, **{"id": id, "model": model, "run": f"runs/{id}"} | failed
            )
            known.write(made)
            whole = {"forget": {"whole": 3.0 + number + place}, "retain": {"whole": 4.0}}
            before = {"forget": {"whole": 9.0}, "retain": {"whole": 12.0}}
            distance = {"count": 2, "chance": 15.6, "generators": {"unlearned": whole, "original": before}}
            folder.write(f"runs/{id}/metrics.json", json.dumps({"oracle_distance": distance}).encode())
            if number:
                verdict = "PASS" if place else "FAIL"
                audit = {"verdict": verdict, "tests": ["probes"], "probes": {"verdict": verdict}}
                folder.write(f"runs/{id}/audit.json", json.dumps(audit).encode())
    return found


def test_the_terminal_shows_the_columns_that_it_has_room_for(compared):
    from rich.console import Console

    def told_in(width: int) -> str:
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(leaderboard_page.table(job.report(compared), width))
        return console.export_text()

    narrow, wide = told_in(80), told_in(200)
    assert "…" not in narrow and "The page has more columns." in narrow and "cosine" not in narrow.split("paper")[0]
    assert "FAIL 1 (probes" in narrow and "FAIL 1 (probes 1), PASS 3" in wide
    assert "retain cosine" in wide and "The page has" not in wide


def test_the_leaderboard_is_the_mean_over_seeds_and_originals(compared):
    document = job.report(compared)
    first, second = document["rows"]
    assert (first["method"], first["done"], first["of"], second["method"], second["done"]) == (
        "paper",
        3,
        4,
        "decoupling",
        4,
    )
    assert first["options"]["method"]["alpha"] == 1.0 and second["options"]["method"]["threshold"] == 1.0
    assert first["figures"]["forget.distance"] == {"mean": 4.0, "spread": 1.0}
    whole = [math.sqrt((f * f + 16) / 2) for f in (3, 4, 5)]
    assert first["figures"]["distance"]["mean"] == pytest.approx(sum(whole) / 3)
    assert second["figures"]["audit.passed"]["mean"] == 0.75 and "audit.passed" not in first["figures"]
    cells = [leaderboard_page.cell(row, "audit.passed", "") for row in (first, second)]
    assert cells == ["–", "FAIL 1 (probes 1), PASS 3"] and "with these tests: probes" in " ".join(document["notes"])
    assert document["distance"] == "oracle spreads" and document["chance"] == 15.6 and document["tuned"] == 2
    original = document["reference"]["original"]
    assert original["forget.distance"] == 9.0 and original["distance"] == pytest.approx(math.sqrt((81 + 144) / 2))
    assert document["reference"]["oracle"]["forget.cosine"] == 0.6 and "paper" in document["notes"][-1]
    page = Path(compared.compare_dir, leaderboard_page.NAME).read_text()
    assert (
        "the loss is not finite" in page
        and "://" not in page
        and json.loads(Path(compared.compare_dir, leaderboard.NAME).read_text()) == document
    )
    drawn = leaderboard_page.drawing(document)
    marks, (wide, high) = drawn["marks"], (leaderboard_page.WIDTH, leaderboard_page.HEIGHT)
    assert [mark["label"] for mark in marks] == ["paper", "decoupling"]
    assert 0 <= marks[0]["x"] < marks[1]["x"] <= wide and all(0 <= mark["y"] <= high for mark in marks)
    assert [label.text for label in drawn["labels"]] == ["1", "2"]
    assert "few: 2 seeds, 2 originals, 2 oracles" in page
    document["reference"]["original"]["retain.cosine"] = document["reference"]["oracle"]["retain.cosine"] + 0.001
    first, second = (r["y"] + r["rise"] for r in leaderboard_page.drawing(document)["references"])
    assert second - first >= labels.HEIGHT, "names of lines that lie close"


def test_a_run_whose_figures_are_gone_counts_for_nothing(compared):
    """Without its distance in oracle spreads it would be averaged in another unit."""
    before = job.report(compared)
    lost = "p001-s0-m0"
    folder = Storage(compared.final({label: compared.candidates(label)[1] for label in compared.methods}).sweep_dir)
    for damage in (b'{"a":', None):
        folder.write(f"runs/{lost}/metrics.json", damage) if damage else folder.delete(f"runs/{lost}/metrics.json")
        row = next(row for row in job.report(compared)["rows"] if row["method"] == "decoupling")
        assert (row["done"], row["of"]) == (3, 4) and f"metrics.json of {lost} is missing or damaged" in row["failed"]
        assert row["figures"]["forget.distance"]["mean"] == pytest.approx((5 + 6 + 7) / 3)
    assert before["rows"][1]["done"] == 4
    Storage(compared.compare_dir).delete("tune")
    good = Storage(compared.compare_dir).read(leaderboard.NAME)
    with pytest.raises(UnlearnError, match="no run with the settings chosen is done"):
        job.report(compared)
    assert Storage(compared.compare_dir).read(leaderboard.NAME) == good


def test_numbers_of_near_points_lie_beside_each_other_and_of_more_points_share_a_label():
    near = [(str(n), 100.0 + 3 * n, 50.0) for n in range(1, 5)]
    made = labels.placed(near, [], 560, 330)
    assert [label.text for label in made] == ["1", "2", "3", "4"]
    apart = [a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]
             for a, b in itertools.combinations(made, 2)]  # fmt: skip
    assert all(apart)
    same = labels.placed([(str(n), 100.0, 50.0) for n in range(1, 11)], [], 560, 330)
    assert [label.text for label in same] == ["1, 9, 10", "2", "3", "4", "5", "6", "7", "8"]
    (border,) = labels.placed([("7", 558.0, 50.0)], [(540, 20, 560, 49)], 560, 330)
    assert border.anchor == "end" and border.y > 50, "within the drawing, and not over a name"
    edges = labels.placed(
        [("1", 100.0, 3.0), ("2", 100.0, 327.0), ("3", 104.0, 327.0), ("4", 108.0, 327.0)], [], 560, 330
    )
    assert all(0 <= label.box[1] and label.box[3] <= 330 for label in edges), "not over the ticks below"


@pytest.mark.parametrize("count, width", [(12, 140), (30, 140), (12, 200), (40, 560)])
@pytest.mark.parametrize("beside", [(), (("x", 150.0, 100.0), ("y", 50.0, 100.0))])
def test_a_label_of_several_points_lies_within_the_drawing_and_over_nothing(count, width, beside):
    points = [*[(str(n), 100.0, 100.0) for n in range(1, count)], *[b for b in beside if b[1] < width]]
    made = labels.placed([*points, (str(count), 100.0, 100.0)], [(0, 30, 60, 60)], width, 200)
    boxes = [label.box for label in made]
    assert all(0 <= left and right <= width and 0 <= top and bottom <= 200 for left, top, right, bottom in boxes)
    assert not any(labels._meet(a, b) for a, b in itertools.combinations([*boxes, (0, 30, 60, 60)], 2))
    if width > 200:
        assert any(" and " in label.text for label in made), "what has no room is counted"


def test_every_run_is_audited_as_alone_and_one_that_cannot_be_stops_no_other(tmp_path, monkeypatch):
    """tests/jobs/test_compare_on_ray.py audits runs that were trained."""
    audit = {"tests": ["membership"], "limit": 10, "resamples": 100, "membership": {"views": 1}}
    found = comparisons.parse(tree(tmp_path, tune={}, originals=None, audit=audit))
    final = found.final({label: found.candidates(label)[0] for label in found.methods})
    point, trials = final.grid()[0], []
    for seed, name in ((3, "embedded:mae-fashion"), (0, "embedded:mae-fashion"), (5, "embedded:mae-fashion-oracle")):
        id = final.trial_id("p000", seed, None)
        run = final.of(point, seed, None, id)
        Storage(run.run_dir).write("config.yaml", config.dump(run).encode())
        weights.write(weights.build(config.Model(weights=name)), Storage(run.run_dir).where("model"), {})
        Storage(run.run_dir).write("metrics.json", b'{"rows": []}')
        trials.append(trial("p000", seed, point, 0.6, 0.77, id=id, run=f"runs/{id}"))
    folders = [Storage(Storage(final.sweep_dir).where(t.run)) for t in trials]
    whole = folders[0].read("model/weights.safetensors")
    folders[0].write("model/weights.safetensors", whole[:-1])
    told, measured, measure = [], [], Bench.__call__
    monkeypatch.setattr(Bench, "__call__", lambda self, piece: measured.append(piece) or measure(self, piece))

    def stopped(*_) -> str:
        raise StorageError("no space left")

    def audited(**options) -> list[dict]:
        measured.clear()
        compare_audits.audit_all(found, final, trials, lambda *now: told.append(now), lambda: None, **options)
        return [json.loads(folder.read("audit.json")) for folder in folders if folder.is_file("audit.json")]

    made = audited()
    assert told[0] == ("auditing", 0, 3) and told[-1] == ("auditing", 3, 3)
    assert made[0]["membership"]["original"] == made[1]["membership"]["original"]
    assert made[0]["weights"]["unlearned"] != made[1]["weights"]["unlearned"]
    # two sets of the original, of the oracle, and of each unlearned model
    assert len(Storage(tmp_path).files("audit")) == len(measured) == 8
    row = leaderboard.document(found, {"paper": point}, trials, Storage(final.sweep_dir))["rows"][0]
    assert row["audits"]["broken"] == 1 and "is not the file" in row["audits"]["message"]
    assert leaderboard_page.cell(row, "audit.passed", "") == "NOT SHOWN 2, not audited 1"

    with monkeypatch.context() as patch:
        patch.setattr(subjects, "bootstrap", None)
        assert audited() == made and not measured, "what there is stays, and what has failed is not tried again"
    folders[0].write("model/weights.safetensors", whole)
    with monkeypatch.context() as patch:
        patch.setattr(page, "write", stopped)
        with pytest.raises(StorageError, match="no space left"):
            audited(retry_failed=True)
    assert not folders[0].is_file("audit.json"), "else the page would never be written"
    again = audited(retry_failed=True)
    assert all(folder.is_file(page.NAME) for folder in folders)
    assert len(again) == 3 and again[1:] == made and not folders[0].is_file(leaderboard.AUDIT_FAILED)
    for folder, before in zip(folders[1:], made, strict=True):
        alone = audits.audit(runs.resolve(runs.load(folder.uri), measured=True), audit_settings.parse(audit))
        assert alone.pop("seconds").keys() == before.pop("seconds").keys() and alone == before
    folders[0].write("audit.json", b"\0" * 500)  # as after a loss of power
    folders[1].write("audit.json", b"[]")
    folders[2].write("audit_failed.json", b"\0" * 20)
    folders[2].delete("audit.json")
    cut = leaderboard.document(found, {"paper": point}, trials, Storage(final.sweep_dir))["rows"][0]
    assert not cut["audits"]["broken"] and not cut["audits"]["verdicts"]
    anew = [document | {"seconds": None} for document in audited()]
    assert anew == [document | {"seconds": None} for document in again] and not measured
    folders[0].write("model/weights.safetensors", whole[:-1])
    found = comparisons.parse(tree(tmp_path, tune={}, originals=None, audit=audit | {"resamples": 101}))
    assert len(audited()) == 2 and not folders[0].is_file(page.NAME), "what other options have shown goes"

    folders[0].write("model/weights.safetensors", whole)
    audit_of = audits.audit
    for of, resamples, left in ((trials[:1], 102, 2), (trials[:2], 103, 0)):
        found = comparisons.parse(tree(tmp_path, tune={}, originals=None, audit=audit | {"resamples": resamples}))
        fatal = {folder.uri for folder, _ in zip(folders, of, strict=False)}

        def dying(run, *rest, fatal=fatal, **options):
            if run.folder in fatal:
                raise WorkerDied("a worker died more than 3 times")
            return audit_of(run, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(audits, "audit", dying)
            if left:
                assert len(audited()) == left, "one whose workers die stops no other"
            else:
                with pytest.raises(WorkerDied):
                    audited()
            assert folders[0].is_file(leaderboard.AUDIT_FAILED)


def test_without_an_oracle_there_is_no_distance_and_it_is_said(compared):
    final = compared.final({label: compared.candidates(label)[1] for label in compared.methods})
    trials = [t for t in Trials(Storage(final.sweep_dir)).all()]
    figures = {"forget.cosine": 0.6, "retain.cosine": 0.77, "cost.flops": 1e12}
    plain = comparisons.parse(
        tree(compared.compare_dir, originals=[{"weights": "/a"}], tune={"choose": ["forget.cosine"]})
    )
    bare = [t.__class__(**{**t.__dict__, "figures": figures, "oracle": {}}) for t in trials if t.status == "done"]
    chosen = {label: plain.candidates(label)[1] for label in plain.methods}
    for t in bare:
        Storage(final.sweep_dir).write(f"bare/{t.run}/metrics.json", b'{"rows": []}')
    document = leaderboard.document(plain, chosen, bare, Storage(f"{final.sweep_dir}/bare"))
    assert document["distance"] is None and "There is no oracle" in document["notes"][0]
    drawn, page = leaderboard_page.drawing(document), leaderboard_page.html(document)
    assert {mark["label"] for mark in drawn["marks"]} == {"paper", "decoupling"}
    assert "cosine on the forget set" in page and "oracle's" not in page and "distance to the oracle" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_the_page_on_a_desk_and_on_a_phone(compared, tmp_path):
    job.report(compared)
    page = Path(compared.compare_dir, leaderboard_page.NAME)
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 390):
            tab.open(page, width)
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert tab.run("document.querySelectorAll('svg circle').length") == 2 and tab.complaints == []
