"""Workers and figures of a whole evaluation; what evaluate writes, and what it must not."""

import gc
import hashlib
import json
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.evaluated import TEST, classes_of, compare, make_run, write_model
from support.runs import evaluate, report
from support.trunks import ALEX, trunk

from jobs.cluster import connected
from unlearn import config
from unlearn.data import shards
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError, UnlearnError
from unlearn.evaluation import comparison, features, perceptual
from unlearn.evaluation.report import data_uri
from unlearn.evaluation.verdict import verdict
from unlearn.models import weights
from unlearn.run import resolve


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
    shown, hidden = ([data_uri(image) for generator in (None, *compared.models) for image in compared.column(name,
                generator)]
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


def test_an_oracle_that_was_trained_without_other_images_is_told(tmp_path, caplog):
    known, told = resolve(make_run(tmp_path), measured=True).sets["forget"], []
    for name, without in (("a", known.digest), ("b", "0" * 64)):
        oracle = weights.build(config.Model(variant="vit_nano_patch4_32"), 5)
        weights.write(oracle, str(tmp_path / name), {"without": without})
        run = resolve(make_run(tmp_path, evaluation={"oracle": str(tmp_path / name)}), measured=True)
        models = comparison.generators(run.settings)
        comparison.warn_of_others(comparison.located(run, models), models)
        told.append([record.getMessage() for record in caplog.records if "without other images" in record.getMessage()])
    assert not told[0] and [message.startswith(f"evaluation.oracle: {tmp_path}/b") for message in told[1]] == [True]


def test_a_report_is_of_what_was_measured(done):
    settings, document, _ = done
    there = Storage(settings.run_dir)
    try:
        other = settings.evaluation.model_copy(update={"views": [config.ViewSpec(kind="outpaint", size=0.5)]})
        with pytest.raises(UnlearnError, match="measured with other views"):
            report(settings.model_copy(update={"evaluation": other}))
        for damaged in (b'{"rows":', b"[]", b"{}"):
            there.write("metrics.json", damaged)
            with pytest.raises(UnlearnError, match="metrics.json is damaged: `unlearn evaluate`"):
                report(settings)
    finally:
        there.write("metrics.json", json.dumps(document).encode())


def test_one_generator_is_in_memory_at_a_time(tmp_path):
    compared = compare(make_run(tmp_path))
    former = weakref.ref(compared.generator("original"))
    compared.generator("unlearned")
    gc.collect()
    assert former() is None
