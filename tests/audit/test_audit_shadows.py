"""Shadow models: what each is trained on, that training them goes on where it was, and membership image by image with
them."""

from dataclasses import replace

import numpy as np
import pytest
from support.models import TINY

from jobs import audit as job
from unlearn import config
from unlearn.audit import membership, shadows
from unlearn.audit import settings as audits
from unlearn.data.images import Images
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, ImageError, UnlearnError
from unlearn.models import weights
from unlearn.run import Run, resolve

FORGET = {"classes": ["Bag"], "per_class": 30}


def recipe(folder, **data) -> Run:
    tree = {
        "run_dir": str(folder), "model": {"options": TINY}, "method": {"name": "pretrain"},
        "data": {"train": "embedded:fashion-train", "retain": {"classes": ["Bag", "Coat"]}} | data,
        "training": {"engine": "torch", "steps": 2, "batch_size": 8},
    }  # fmt: skip
    return resolve(config.parse(tree))


def run_of(folder) -> Run:
    """A run that forgets thirty bags; all of its models are of random weights."""
    for name, seed in (("original", 0), ("oracle", 1), ("run/model", 2)):
        weights.write(weights.build(config.Model(options=TINY), seed), str(folder / name), {})
    tree = {
        "run_dir": str(folder / "run"), "model": {"weights": str(folder / "original")},
        "data": {"train": "embedded:fashion-train", "forget": FORGET, "retain": {"classes": ["Coat"]}},
        "training": {"engine": "torch", "steps": 1},
        "evaluation": {"data": "embedded:fashion-test", "oracle": str(folder / "oracle")},
    }  # fmt: skip
    return resolve(config.parse(tree), measured=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run, folder of four shadows of it)."""
    folder = tmp_path_factory.mktemp("shadowed")
    run, to = run_of(folder), str(folder / "shadows")
    made = job.train_shadows(run, recipe(to), to, 4)
    assert made == [Storage(to).where(f"{shadows.name(n)}/model") for n in range(4)]
    return run, to


def test_a_shadow_sees_everything_but_its_half(trained):
    run, to = trained
    rows = [shadows.Trainer(recipe(to), to, run.sets["forget"])._rows(n).rows for n in range(2)]
    forget = set(run.sets["forget"].rows.tolist())
    seen = [set(r.tolist()) & forget for r in rows]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == forget and len(seen[0]) == 15
    assert [len(r) for r in rows] == [1000 - 15] * 2


def test_what_is_trained_is_not_trained_again(trained, monkeypatch):
    run, to = trained
    before = [weights.fingerprint(Storage(to).where(f"{shadows.name(n)}/model")) for n in range(4)]
    assert len(set(before)) == 4
    Storage(to).delete(f"{shadows.name(2)}/model")  # as where it was stopped before the end: its checkpoint is there
    calls = []
    worker = shadows.loop.worker
    monkeypatch.setattr(shadows.loop, "worker", lambda run: calls.append(run.folder) or worker(run))
    job.train_shadows(run, recipe(to), to, 4)
    assert [name.rpartition("/")[2] for name in calls] == ["shadow-002"]
    assert before == [weights.fingerprint(Storage(to).where(f"{shadows.name(n)}/model")) for n in range(4)]


def test_shadows_of_something_else_are_refused(trained, tmp_path):
    run, to = trained
    with pytest.raises(ConfigError, match="another recipe or forget set"):
        job.train_shadows(run, recipe(to, retain={"classes": ["Bag"]}), to, 4)
    with pytest.raises(ConfigError, match="of the 30 forget images are not among its training images"):
        job.train_shadows(run, recipe(tmp_path, retain={"classes": ["Coat"]}), str(tmp_path), 4)
    with pytest.raises(ConfigError, match="its data.train is not that of the run"):
        job.train_shadows(run, recipe(tmp_path, train="embedded:fashion-test"), str(tmp_path), 4)


def test_shadows_of_another_forget_set_of_that_size_are_refused(trained, tmp_path):
    run, to = trained
    whole = run.sets["forget"]
    other = replace(whole, rows=whole.rows + 1)
    with pytest.raises(ConfigError, match="trained for another forget set"):
        shadows.found(to, run.settings.model, other)
    storage = Storage(str(tmp_path))
    storage.write(shadows.CARD, b'{"identity": "x", "forget": 30, "seed": 0}')  # as they were written before
    with pytest.raises(UnlearnError, match="of an earlier version"):
        shadows.found(str(tmp_path), run.settings.model, whole)


def test_membership_is_told_image_by_image(trained):
    run, to = trained
    asked = ["tests=[membership]", "membership.views=1", "resamples=100", f"shadows={to}"]
    document = job.audit(run, audits.load(None, asked))["membership"]
    figures = document["figures"]
    assert {"lr_auc", "lr_tpr_1", "worst_auc"} <= figures.keys() and "4 shadow models" in figures["lr_auc"]["note"]
    assert all(
        0 <= document[g][name] <= 1 for g in ("original", "unlearned", "oracle") for name in ("lr_auc", "worst_auc")
    )
    limited = job.prepared(run, audits.load(None, [*asked, "limit=10"]))
    whole = job.prepared(run, audits.load(None, asked))
    at = np.isin(run.sets["forget"].rows, limited.sets["forget"].rows)
    assert (limited.seen == whole.seen[:, at]).all(), "who has seen what follows the images that are drawn"


def test_a_damaged_image_is_left_out_of_what_shadows_have_seen(trained, monkeypatch):
    run, to = trained
    damaged, whole, ratio, unseen = int(run.sets["forget"].rows[3]), Images.__getitem__, membership._ratios, []

    def image(self, row: int) -> np.ndarray:
        if row == damaged:
            raise ImageError("cut")
        return whole(self, row)

    monkeypatch.setattr(Images, "__getitem__", image)
    monkeypatch.setattr(membership, "_ratios", lambda *asked: unseen.append(asked[2][0]) or ratio(*asked))
    data = run.settings.data.model_copy(update={"max_bad_images": 1})
    run = replace(run, settings=run.settings.model_copy(update={"data": data}))
    asked = audits.load(None, ["tests=[membership]", "membership.views=1", "resamples=100", f"shadows={to}"])
    document = job.audit(run, asked, again=True)
    assert "lr_auc" in document["membership"]["figures"]
    assert (unseen[0] == ~np.delete(job.prepared(run, asked).seen, 3, 1)).all()
