"""Which images are measured, under which views, and which generators."""

import numpy as np
import pytest
import torch
from support.evaluated import TEST, TRAIN, classes_of, compare, make_run, some_ids, write_model

from unlearn import config
from unlearn.data import held_out, selection
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, UnlearnError
from unlearn.evaluation import comparison


def with_sets(forget=None, retain=None, data=TEST, limit=None, trained=None) -> dict:
    evaluation = {"data": data, "limit": limit} if data else {"limit": limit}
    tree = {"run_dir": "unused", "data": {"train": TRAIN, "forget": forget, "retain": retain}, "training": {"steps": 1}}
    settings = config.parse(tree | {"evaluation": evaluation})
    return held_out.sets(settings, selection.sets(settings.data, settings.seed) if trained is None else trained)


def test_guidance_is_for_models_that_take_a_prompt(tmp_path):
    with pytest.raises(ConfigError, match="evaluation.guidance_scale: family mae takes no prompt; leave it out"):
        compare(make_run(tmp_path, evaluation={"guidance_scale": 7.5}))


def test_sets_are_held_out_rows_of_the_same_classes():
    found = with_sets({"classes": [1, 5], "per_class": 3, "limit": 4})
    assert found["forget"].manifest.uri.endswith("fashion-test") and found["retain"].manifest.uri.endswith(
        "fashion-test"
    )
    assert (len(found["forget"]), classes_of(found["forget"])) == (200, {1, 5})
    assert (len(found["retain"]), classes_of(found["retain"])) == (800, {0, 2, 3, 4, 6, 7, 8, 9})
    assert classes_of(with_sets({"classes": [1]}, {"classes": [2, 3], "per_class": 2})["retain"]) == {2, 3}


def test_where_a_proxy_stands_for_the_retain_set_held_out_rows_are_of_what_it_stands_for():
    tree = {
        "run_dir": "unused", "training": {"steps": 1}, "evaluation": {"data": TEST},
        "data": {"train": TRAIN, "forget": {"classes": [1, 5]}, "proxy": {"classes": [2]}},
    }  # fmt: skip
    settings = config.parse(tree)
    found = held_out.of_classes(settings, selection.sets(settings.data, settings.seed))
    assert classes_of(found["forget"]) == {1, 5} and classes_of(found["retain"]) == {0, 2, 3, 4, 6, 7, 8, 9}


def test_retain_never_holds_what_is_forgotten():
    found = with_sets({"classes": ["Bag"]}, {"per_class": 10}, trained={})
    assert 8 not in classes_of(found["retain"]) and len(found["retain"]) == 900


def test_a_forget_set_without_classes_is_measured_on_training_images():
    by_id = with_sets({"ids": some_ids(3)})
    assert by_id["forget"].manifest.uri.endswith("fashion-train") and len(by_id["forget"]) == 3
    assert by_id["retain"].manifest.uri.endswith("fashion-test") and len(by_id["retain"]) == 1000
    by_number = with_sets({"per_class": 2})["forget"]
    assert by_number.manifest.uri.endswith("fashion-train") and len(by_number) == 20


def test_without_held_out_shards_the_sets_are_those_of_training():
    found = with_sets({"classes": [1], "per_class": 7}, {"classes": [2], "limit": 9}, data=None)
    assert {name: len(rows) for name, rows in found.items()} == {"forget": 7, "retain": 9}


def test_a_limit_draws_with_the_seed_from_the_whole_set():
    found, again = with_sets({"classes": [1, 5]}, limit=30), with_sets({"classes": [1, 5]}, limit=30)
    assert [len(s) for s in found.values()] == [30, 30]
    assert (found["forget"].rows == again["forget"].rows).all() and (np.diff(found["forget"].rows) > 0).all()
    assert classes_of(found["forget"]) == {1, 5}


def test_views_depend_on_the_image_and_the_seed_alone(tmp_path):
    drawn = [{"kind": "random"}, {"kind": "random"}, {"kind": "box"}]
    run = make_run(tmp_path, evaluation={"data": TEST, "limit": 6, "views": drawn})
    one, other = compare(run), compare(run)
    for number in range(3):
        whole = one.view("retain", number, np.arange(6)).hidden
        parts = [other.view("retain", number, np.array([i])).hidden for i in reversed(range(6))]
        assert torch.equal(whole, torch.cat(parts[::-1]))
    first = one.view("retain", 0, np.arange(6)).hidden
    assert len({tuple(row) for row in first.tolist()}) == 6, "every image has its own view"
    assert not torch.equal(first, one.view("retain", 1, np.arange(6)).hidden)
    assert not torch.equal(first[:5], one.view("forget", 0, np.arange(5)).hidden)


def test_reconstructions_keep_what_is_seen(tmp_path):
    compared = compare(make_run(tmp_path))
    kept, pixels = compared.pixels("retain", np.arange(5))
    view = compared.view("retain", 0, kept)
    before, after = (compared.reconstruct(g, pixels, view) for g in ("original", "unlearned"))
    hidden = view.pixel_mask(32).expand(-1, 3, -1, -1)
    torch.testing.assert_close(before[~hidden], pixels.float()[~hidden] / 255)
    assert (before[hidden] - after[hidden]).abs().mean() > 0.01
    assert 0 <= before.min() and before.max() <= 1


def test_generators_are_those_that_are_there(tmp_path):
    run = make_run(tmp_path, evaluation={"oracle": str(tmp_path / "oracle")})
    assert list(comparison.generators(run)) == ["original", "unlearned", "oracle"]
    Storage(run.run_dir).delete("model")
    assert list(comparison.generators(run)) == ["original", "oracle"]
    with pytest.raises(UnlearnError, match="nothing to evaluate"):
        comparison.generators(run.model_copy(update={"model": config.Model(), "evaluation": config.Evaluation()}))


def test_an_oracle_of_another_shape_is_refused(tmp_path):
    oracle = write_model(tmp_path / "oracle", 2, patch_size=8)
    with pytest.raises(ConfigError, match="oracle 32 px in 4 x 4 patches"):
        compare(make_run(tmp_path, evaluation={"oracle": oracle})).generator("oracle")


def test_sets_of_a_run_agree_with_training_where_they_should():
    found = with_sets({"classes": [1]}, None, data=None)
    data = config.Data(train=TRAIN, forget=config.Rows(classes=[1]))
    assert selection.describe(found) == selection.describe(selection.sets(data, 0))
