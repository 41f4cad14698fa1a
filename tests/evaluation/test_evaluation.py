"""Metrics against computations of their own; sets, views and workers; what evaluate writes, and what it must not."""

import gc
import hashlib
import json
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.runs import evaluate, report
from support.trunks import ALEX, trunk

from jobs.cluster import connected
from unlearn import config
from unlearn.data import held_out, selection, shards
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError, ConfigError, UnlearnError
from unlearn.evaluation import comparison, features, intervals, metrics, perceptual
from unlearn.evaluation.report import data_uri
from unlearn.evaluation.verdict import verdict
from unlearn.models import weights
from unlearn.run import resolve

TRAIN, TEST = "embedded:fashion-train", "embedded:fashion-test"
NANO = config.Model(variant="vit_nano_patch4_32")


def normal(*shape, seed=0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape)).float()


def write_model(folder, seed, **options) -> str:
    """Random weights that paint something else with every seed."""
    model = weights.build(NANO.model_copy(update={"options": options}), seed)
    torch.nn.init.normal_(model.decoder.pred.bias, generator=torch.Generator().manual_seed(seed))
    weights.write(model, str(folder), {})
    return str(folder)


def make_run(root, **parts) -> config.RunConfig:
    """A run whose original and unlearned models are there, forgetting five images by their ids."""
    write_model(root / "original", 0)
    write_model(root / "run" / "model", 1)
    tree = {
        "name": "test", "run_dir": str(root / "run"), "model": {"weights": str(root / "original")},
        "data": {"train": TRAIN, "forget": {"ids": some_ids(5)}, "retain": {"classes": ["Bag", "Dress"]}},
        "training": {"engine": "torch", "steps": 1},
        "evaluation": {"data": TEST, "limit": 5, "batch_size": 2, "views": [{"kind": "random", "size": 0.5}], "pictures": 2},
    }  # fmt: skip
    for key, values in parts.items():
        tree[key] = tree.get(key, {}) | values
    return config.parse(tree)


def some_ids(count) -> list[str]:
    return shards.load(TRAIN).table(["id"], [1])["id"].to_pylist()[:count]


# Figures


def test_fid_is_the_frechet_distance():
    real, made = normal(60, 5).numpy().astype(float), normal(70, 5, seed=1, scale=1.7).numpy().astype(float) + 0.3
    a, b = np.cov(real.T), np.cov(made.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    expected = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    assert metrics.fid(torch.from_numpy(real), torch.from_numpy(made)) == pytest.approx(expected, rel=1e-9)


def test_fid_of_few_images_is_a_number_and_of_one_is_none():
    few = normal(4, 50)
    assert metrics.fid(few, few) == pytest.approx(0, abs=1e-3)
    assert metrics.fid(few, few + 1) == pytest.approx(50, rel=1e-3)
    assert metrics.fid(few[:1], few) is None


def test_inception_score_is_the_mean_of_ten_splits():
    scores = normal(40, 6, scale=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        order = torch.randperm(40).numpy()
    p = np.exp(scores.numpy().astype(float)[order])
    p /= p.sum(1, keepdims=True)
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p, 10)]
    state = torch.random.get_rng_state()
    mean, std = metrics.inception_score(scores, 3)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are not touched"
    assert (mean, std) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts, ddof=1)))
    assert metrics.inception_score(scores[:1], 0) == (pytest.approx(1), None)


def test_splits_of_the_inception_score_are_even():
    """95 images are dealt to ten splits of nine or ten: none of five, whose score would stand far apart."""
    scores = normal(95, 6, scale=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        p = torch.softmax(scores.double()[torch.randperm(95)], 1).numpy()
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.array_split(p, 10)]
    assert metrics.inception_score(scores, 3) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts, ddof=1)))


def test_cosine_is_of_each_image_to_its_own_original():
    a, b = normal(9, 30), normal(9, 30, seed=1)
    x, y = a.numpy().astype(float), b.numpy().astype(float)
    expected = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    np.testing.assert_allclose(metrics.cosine(a, b).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert metrics.cosine(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [0]


def test_psnr_is_of_the_hole_alone():
    from torchmetrics.image import PeakSignalNoiseRatio

    real, noise = torch.rand(6, 3, 8, 8), 0.1 * normal(6, 3, 8, 8)
    hidden = torch.zeros(6, 1, 8, 8, dtype=torch.bool)
    hidden[:, :, 2:6, 2:6] = True
    made = (real + noise).clamp(0, 1)
    outside = torch.where(hidden, made, 1 - made)
    errors = metrics.hole_errors(made, real, hidden)
    assert torch.equal(errors, metrics.hole_errors(outside, real, hidden)), "pixels outside the hole must not count"
    x, y = made.numpy().astype(float)[:, :, 2:6, 2:6], real.numpy().astype(float)[:, :, 2:6, 2:6]
    assert metrics.psnr(errors) == pytest.approx(-10 * np.log10(((x - y) ** 2).mean()), rel=1e-9)
    theirs = PeakSignalNoiseRatio(data_range=1.0)(made[:, :, 2:6, 2:6], real[:, :, 2:6, 2:6])
    assert metrics.psnr(errors) == pytest.approx(float(theirs), rel=1e-5)
    assert metrics.psnr(torch.zeros(3)) == 100


def test_kid_is_that_of_other_implementations():
    from torchmetrics.image.kid import poly_mmd

    real, made = normal(60, 40), normal(60, 40, seed=1, scale=1.4)
    found = intervals.kid(real, made, 0)
    assert found is not None
    value, low, high = found
    assert value == pytest.approx(float(poly_mmd(real.double(), made.double())), rel=1e-9)
    assert low < value < high and found == intervals.kid(real, made, 0) != intervals.kid(real, made, 1)
    few = [
        k[0] for seed in range(60) if (k := intervals.kid(normal(8, 40, seed=seed), normal(8, 40, seed=99 + seed), 0))
    ]
    assert abs(np.mean(few)) < 3 * np.std(few) / 60**0.5, "few images of one distribution: nothing, on average"
    assert intervals.kid(real[:1], made, 0) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "KERNEL_ROWS", 7)
        few = intervals.kid(real, real, 0)
        assert few is not None and few[0] == pytest.approx(intervals.kid(real, real.clone(), 0)[0]) and few != found
    assert all(map(np.isfinite, intervals.kid(real[:3], made[:3], 0) or [np.nan])), "also where a draw is of one image"


def test_intervals_cover_the_truth_as_often_as_they_say():
    inside, large = {"mean": 0, "kid": 0}, intervals.kid(normal(1500, 10), 0.5 + normal(1500, 10, seed=1), 0)
    assert large is not None
    for seed in range(150):
        low, high = intervals.of_mean(normal(50, seed=seed).square(), seed, lambda means: means) or (0, 0)
        inside["mean"] += low <= 1 <= high
        found = intervals.kid(normal(60, 10, seed=seed), 0.5 + normal(60, 10, seed=1000 + seed), seed)
        inside["kid"] += found is not None and found[1] <= large[0] <= found[2]
    assert all(0.85 <= count / 150 <= 0.99 for count in inside.values()), inside


def test_ssim_is_of_the_hole_alone():
    real = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    made = (real + 0.2 * normal(2, 3, 24, 24)).clamp(0, 1)
    hidden = torch.zeros(2, 1, 24, 24, dtype=torch.bool)
    hidden[0, :, 12, 11] = hidden[1, :, 10:13, 10:13] = True
    x, y = real[0].numpy().astype(float)[:, 7:18, 6:17], made[0].numpy().astype(float)[:, 7:18, 6:17]
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    mx, my = (window * x).sum((1, 2)), (window * y).sum((1, 2))
    vx, vy, both = ((window * z).sum((1, 2)) for z in (x * x, y * y, x * y))
    vx, vy, both = vx - mx**2, vy - my**2, both - mx * my
    c, d = 0.01**2, 0.03**2
    expected = (2 * mx * my + c) * (2 * both + d) / ((mx**2 + my**2 + c) * (vx + vy + d))
    assert float(metrics.hole_ssim(made, real, hidden)[0]) == pytest.approx(expected.mean(), rel=1e-6)
    assert metrics.hole_ssim(real, real, hidden).tolist() == [pytest.approx(1)] * 2


# Sets


def with_sets(forget=None, retain=None, data=TEST, limit=None, trained=None) -> dict:
    evaluation = {"data": data, "limit": limit} if data else {"limit": limit}
    tree = {"run_dir": "unused", "data": {"train": TRAIN, "forget": forget, "retain": retain}, "training": {"steps": 1}}
    settings = config.parse(tree | {"evaluation": evaluation})
    return held_out.sets(settings, selection.sets(settings.data, settings.seed) if trained is None else trained)


def compare(settings: config.RunConfig) -> comparison.Comparison:
    return comparison.Comparison(resolve(settings, measured=True), comparison.generators(settings))


def test_guidance_is_for_models_that_take_a_prompt(tmp_path):
    with pytest.raises(ConfigError, match="evaluation.guidance_scale: family mae takes no prompt; leave it out"):
        compare(make_run(tmp_path, evaluation={"guidance_scale": 7.5}))


def classes_of(rows) -> set[int]:
    return set(rows.labels.tolist())


def test_sets_are_held_out_rows_of_the_same_classes():
    found = with_sets({"classes": [1, 5], "per_class": 3, "limit": 4})
    assert found["forget"].manifest.uri.endswith("fashion-test") and found["retain"].manifest.uri.endswith(
        "fashion-test"
    )
    assert (len(found["forget"]), classes_of(found["forget"])) == (200, {1, 5})
    assert (len(found["retain"]), classes_of(found["retain"])) == (800, {0, 2, 3, 4, 6, 7, 8, 9})
    assert classes_of(with_sets({"classes": [1]}, {"classes": [2, 3], "per_class": 2})["retain"]) == {2, 3}


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


# Views and generators


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


def test_several_oracles_are_one_column_and_their_spread_is_the_unit_of_the_distance(tmp_path):
    places = [write_model(tmp_path / f"oracle-{seed}", seed) for seed in (2, 3, 4)]
    run = make_run(tmp_path, evaluation={"oracle": places})
    document = evaluate(run)
    assert document["generators"] == ["original", "unlearned", "oracle"] and len(document["weights"]) == 5
    found = {(r["generator"], r["set"]): r for r in document["rows"]}
    single = [r for r in document["oracles"] if r["set"] == "forget"]
    alone = evaluate(
        config.parse(
            run.model_dump(mode="json") | {"evaluation": run.evaluation.model_dump(mode="json") | {"oracle": places[1]}}
        )
    )
    of_second = next(r for r in alone["rows"] if (r["generator"], r["set"]) == ("oracle", "forget"))
    assert single[1] | {"generator": "oracle"} == of_second and "oracle_distance" not in alone
    for figure in ("cosine", "psnr", "fid"):
        values = np.array([r[figure] for r in single])
        assert found["oracle", "forget"][figure] == pytest.approx(values.mean())
        expected = (found["unlearned", "forget"][figure] - values.mean()) / values.std(ddof=1)
        assert document["oracle_distance"]["generators"]["unlearned"]["forget"][figure] == pytest.approx(expected)
    each = document["oracle_distance"]["generators"]["unlearned"]["forget"]
    assert each["whole"] == pytest.approx(np.sqrt((each["cosine"] ** 2 + each["psnr"] ** 2) / 2))
    assert document["oracle_distance"]["chance"] == pytest.approx(4.303 * np.sqrt(4 / 3))
    assert (
        f"Distance to the 3 oracles, in units of their own spread: {each['whole']:.1f} on the forget set"
        in verdict(document)[1][-1]
    )
    report(run)  # written anew from metrics.json, with one column of the oracle


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


# The whole


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(run, what evaluate returned, progress calls)."""
    folder, calls = tmp_path_factory.mktemp("evaluated"), []
    torch.save(trunk(ALEX, perceptual.ALEXNET.convolutions), folder / "alexnet.pth")
    run = make_run(folder, evaluation={"lpips_weights": str(folder / "alexnet.pth")})
    return run, evaluate(run, progress=lambda *call: calls.append(call)), calls


def test_metrics_json_says_what_was_measured(done):
    run, document, calls = done
    assert json.loads(Storage(run.run_dir).read("metrics.json")) == document
    assert [(r["generator"], r["set"]) for r in document["rows"]] == [
        ("original", "forget"), ("unlearned", "forget"), ("original", "retain"), ("unlearned", "retain"),
    ]  # fmt: skip
    assert document["config_hash"] == run.hash() and document["features"] == "efficientnet_lite0"
    assert document["resize"] == "bicubic" and document["guidance_scale"] is None
    digest = hashlib.sha256(Storage(run.evaluation.lpips_weights).read()).hexdigest()
    assert document["networks"] == {"features": document["networks"]["features"], "lpips": digest}
    assert document["sets"]["forget"]["split"] == "training" and document["sets"]["retain"]["split"] == "held-out"
    assert all(r["images"] == 5 and r["view"] == "random 0.5" and r["fid"] > 0 for r in document["rows"])
    assert any("2,048" in note for note in document["notes"]) and any(
        "training images" in note for note in document["notes"]
    )
    assert calls[-1] == (30, 30) and [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_figures_are_those_of_a_computation_by_hand(done):
    run, document, _ = done
    rows = resolve(run, measured=True).measured["retain"]
    compared, network = compare(run), features.build("efficientnet_lite0")
    _, pixels = compared.pixels("retain", np.arange(5))
    view = compared.view("retain", 0, np.arange(5))
    model = weights.build(config.Model(weights=f"{run.run_dir}/model"))
    with torch.inference_mode():
        made = model.denormalise(model.reconstruct(model.normalise(pixels), view)).double().numpy()
    real = pixels.double().numpy() / 255
    hidden = np.broadcast_to(view.pixel_mask(32).numpy(), real.shape)
    a, b = (network(torch.from_numpy(x).float())[0].double().numpy() for x in (made, real))
    row = next(r for r in document["rows"] if (r["generator"], r["set"]) == ("unlearned", "retain"))
    assert classes_of(rows) <= {3, 8}
    assert row["psnr"] == pytest.approx(-10 * np.log10(((made - real) ** 2)[hidden].mean()), rel=1e-6)
    cosines = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    assert (row["cosine"], row["cosine_std"]) == (
        pytest.approx(cosines.mean(), rel=1e-4),
        pytest.approx(cosines.std(), rel=1e-3),
    )
    distances = perceptual.build(run.evaluation.lpips_weights)(*(torch.from_numpy(x).float() for x in (made, real)))
    assert row["lpips"] == pytest.approx(float(distances.mean()), rel=1e-5) and row["lpips_low"] < row["lpips"]


@pytest.fixture(scope="module")
def cluster():
    with connected(config.Cluster(), 2):
        yield


def test_two_ray_workers_give_the_figures_of_one_process(done, cluster, tmp_path):
    """Also where many more are asked for, and the run allows fewer: then as many as there is room for."""
    run, document, _ = done
    many = run.model_copy(update={
        "evaluation": run.evaluation.model_copy(update={"workers": 99}), "run_dir": copy_of_run(run, tmp_path),
        "cluster": run.cluster.model_copy(update={"min_workers": 1}),
        "training": run.training.model_copy(update={"micro_batch_size": run.micro_batch}),
    })  # fmt: skip
    assert evaluate(many)["rows"] == document["rows"]
    with pytest.raises(ClusterError, match="99 x cpus_per_worker 1 = 99 CPUs are asked for"):
        evaluate(many.model_copy(update={"cluster": run.cluster}))


def copy_of_run(run, folder) -> str:
    write_model(folder / "model", 1)
    return str(folder)


def test_a_mistake_in_a_ray_worker_is_told_once_in_its_own_words(done, cluster, tmp_path):
    run, _, _ = done
    wrong = run.evaluation.model_copy(update={"workers": 2, "features": "inception"})
    with pytest.raises(UnlearnError, match=r"^evaluation.features inception brings no weights"):
        evaluate(run.model_copy(update={"evaluation": wrong, "run_dir": copy_of_run(run, tmp_path)}))


def test_nothing_of_the_forgotten_images_is_in_the_run_folder(done):
    run, _, _ = done
    told = b"".join(Storage(run.run_dir).read(n) for n in ("metrics.json", "report.html"))
    compared = compare(run)
    shown, hidden = ([data_uri(image) for generator in (None, *compared.models) for image in compared.column(name, generator)]
                     for name in ("retain", "forget"))  # fmt: skip
    assert all(uri.encode() in told for uri in shown), "the control: retained images are found"
    assert not any(uri.encode() in told for uri in hidden)
    assert not any(i.encode() in told for i in run.data.forget.ids)
    report(run, show_forget=True)
    shown_now = Storage(run.run_dir).read("report.html")
    assert all(uri.encode() in shown_now for uri in hidden) and not any(
        i.encode() in shown_now for i in run.data.forget.ids
    )
    names = {n.split("/")[0] for n in Storage(run.run_dir).files()}
    assert names == {"metrics.json", "report.html", "model"}


def damaged_shards(folder) -> str:
    """Six held-out images, the second of them damaged."""
    manifest = shards.load(TEST)
    table = manifest.read(0, ["image", "label"]).slice(0, 6)
    values = table["image"].to_pylist()
    values[1]["bytes"] = b"\x89PNG damaged"
    table = table.set_column(0, "image", pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()})))
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet")
    return shards.index(str(folder)).uri


def test_damaged_images_are_left_out_and_counted(tmp_path):
    data = {"train": damaged_shards(tmp_path / "shards"), "forget": None, "retain": None}
    run = make_run(
        tmp_path, data=data | {"max_bad_images": 1}, evaluation={"data": None, "batch_size": 1, "limit": None}
    )
    Storage(run.run_dir).delete("model")
    document = evaluate(run)
    assert document["sets"]["retain"]["bad_images"] == 1 and [r["images"] for r in document["rows"]] == [5]
    assert any("1 damaged image" in note for note in document["notes"])
    with pytest.raises(UnlearnError, match="max_bad_images"):
        evaluate(make_run(tmp_path, data=data, evaluation={"data": None}))


def test_a_report_needs_figures(tmp_path):
    with pytest.raises(UnlearnError, match="unlearn evaluate"):
        report(make_run(tmp_path))


def test_one_generator_is_in_memory_at_a_time(tmp_path):
    compared = compare(make_run(tmp_path))
    former = weakref.ref(compared.generator("original"))
    compared.generator("unlearned")
    gc.collect()
    assert former() is None


def test_sets_of_a_run_agree_with_training_where_they_should():
    found = with_sets({"classes": [1]}, None, data=None)
    data = config.Data(train=TRAIN, forget=config.Rows(classes=[1]))
    assert selection.describe(found) == selection.describe(selection.sets(data, 0))
