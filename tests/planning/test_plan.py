"""What a run will need is what it then takes: memory measured byte for byte, FLOPs, the advice, `unlearn plan` and
`--dry-run`."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from support.command import refused
from support.models import SMALL, batch_for, build, cached
from support.peaks import STEP, held, peaks, recorded

from jobs.demo import demo_config
from unlearn import config, views
from unlearn.data import cache, order, selection
from unlearn.data.loader import Batch, Loader
from unlearn.errors import ConfigError
from unlearn.methods import base as methods
from unlearn.models import base, weights
from unlearn.planning import cost, footprint, memory, report, search
from unlearn.planning.memory import Strategy
from unlearn.planning.shape import model_options
from unlearn.run import resolve
from unlearn.training import latents
from unlearn.training.engine import Objective, TorchEngine

# Parameters large enough that ZeRO-3 shares them out, and few activations.
WIDE = (
    "model={family: mae, options: {image_size: 32, patch_size: 8, width: 384, depth: 3, heads: 4, decoder_width: "
    "8, decoder_heads: 2}}"
)
# One view, so that every step is the worst one; two micro-batches a worker and step.
COMMON = [
    "train_views=[{kind: centre, size: 0.5}]", "training.steps=2", "training.log_every=100",
    "training.checkpoint_every=100",
    "training.batch_size=64", "training.micro_batch_size=16",
]  # fmt: skip
TWO = ["cluster.workers=2", "training.engine=deepspeed"]
PLAIN = [
    ["training.dtype=fp32"], ["training.dtype=bf16"], ["training.activation_checkpointing=true"],
    ["method.name=pretrain"],
    ["training.micro_batch_size=64", WIDE], ["method.name=toy_sum", WIDE],
]  # fmt: skip
SHARED = [
    *[[f"training.zero_stage={stage}",
            f"training.dtype={dtype}"] for stage, dtype in enumerate(("bf16", "fp32", "bf16", "fp32"))],
    ["training.offload_optimizer=true", "training.zero_stage=3"], ["training.zero_stage=3", WIDE],
    ["training.zero_stage=1", "training.micro_batch_size=32", WIDE],
    ["method.name=toy_sum", "training.zero_stage=2", WIDE],
]  # fmt: skip
FURTHER = [
    ["training.zero_stage=2", "training.dtype=fp32"], ["training.zero_stage=3", "training.dtype=bf16"],
    ["training.offload_optimizer=true", "training.zero_stage=2"],
    ["method.name=toy_sum", "training.zero_stage=0", WIDE],
]  # fmt: skip


def run_for(folder: Path, *overrides: str) -> config.RunConfig:
    return demo_config(run_dir=str(folder), overrides=[*COMMON, *overrides])


def needed(run: config.RunConfig) -> memory.MemoryEstimate:
    strategy = memory.strategy(run)
    precision = memory.precision(run, strategy)
    found = footprint.measure(run, run.micro_batch, precision, strategy.checkpointing)
    return memory.estimate(found, strategy, precision, run.cluster.workers, run.accumulation, cuda=False)


@pytest.fixture(scope="module")
def measured(toys, tmp_path_factory):
    """measured(case) -> (its run, what its workers really held), measured together with the cases beside it."""
    found: dict[str, tuple] = {}

    def of(case: list[str]) -> tuple:
        key = " ".join(case)
        if key not in found:
            cases = next(cases for cases in (PLAIN, SHARED, FURTHER) if case in cases)
            workers = ["cluster.workers=1", "training.engine=torch"] if cases is PLAIN else TWO
            folder = tmp_path_factory.mktemp("plan")
            runs = [run_for(folder / str(number), *workers, *each) for number, each in enumerate(cases)]
            made = zip(runs, peaks(runs), strict=True)
            found.update(zip(map(" ".join, cases), made, strict=True))
        return found[key]

    return of


CASES = [*PLAIN, *SHARED, *(pytest.param(case, marks=pytest.mark.slow) for case in FURTHER)]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_memory_of_a_worker_is_what_the_plan_says(measured, case):
    run, real = measured(case)
    need = needed(run)
    assert need.total + need.host == pytest.approx(real.peak, rel=0.15), need
    # The parts that stay from step to step; the engines keep a few of the others too. Twice the buckets, since the
    # buffer of an exchange that gloo's thread is the last to let go of seems to stay.
    kept = need.host + sum(need.device[name] for name in ("parameters", "teacher", "optimizer", "first_stage"))
    assert 0.95 * kept < real.between < 1.05 * (kept + need.device["gradients"] + 2 * need.device["buckets"])


@pytest.mark.parametrize("shape", SMALL)
def test_every_family_can_be_planned(shape, tmp_path):
    """On the plain engine, with noise for images: the first stages are not on the device."""
    family, options = SMALL[shape]
    run = run_for(tmp_path, f"model={json.dumps({'family': family, 'options': options})}", "training.engine=torch",
                  "cluster.workers=1", "training.batch_size=32", "training.micro_batch_size=32",
                  "data.latent_cache=codes")  # fmt: skip
    student, teacher = (build(shape, seed) for seed in (1, 2))
    batch = batch_for(student, 32, kind="centre", size=0.5)
    if student.first_stage is None:  # pixels, as the loader hands them out
        batch = Batch((student.denormalise(batch.images) * 255).round().byte(), batch.view, 16, 0)
    else:
        batch = cached(student, Batch(batch.images, batch.view, 16, 0))
    found = footprint.measure(run, 32, "fp32", False)
    assert found.trained.count == sum(p.numel() for p in student.encoder.parameters())
    method = methods.create(run.method)
    for model in (student, teacher):
        model.drop_decoder()
    teacher.first_stage = None
    with recorded() as profile:
        engine = TorchEngine(
            Objective(student, method, teacher.requires_grad_(False)),
            method.trainable(student),
            run.training,
            torch.device("cpu"),
        )
        for _ in range(3):
            with torch.profiler.record_function(STEP):
                engine.step([batch], 0.0)
    # The parameters were there before.
    need = memory.estimate(found, Strategy(None), "fp32", 1, 1, cuda=False)
    grown = need.total - need.device["parameters"] - need.device["teacher"]
    assert grown == pytest.approx(held(profile).peak, rel=0.15), need


def test_nothing_is_computed_and_nothing_fake_is_left_behind(tmp_path):
    """A ViT-H of 2.5 GB, its teacher and its activations take next to no memory."""
    run = run_for(
        tmp_path, "model={family: mae, variant: vit_huge_patch14}", "training.engine=torch", "cluster.workers=1"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = footprint.measure(run, 16, "fp32", False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10
    assert found.trained.count == 630_435_840 and 4 * found.trained.count == pytest.approx(found.curve[-1, 1])
    assert all(type(t) is torch.Tensor for t in base._statistics((0.5,) * 3, (0.5,) * 3, torch.device("cpu")))


def test_what_this_process_has_computed_before_changes_no_measure(tmp_path):
    run = run_for(tmp_path, "training.micro_batch_size=4", *TWO)
    fresh = footprint.measure(run, 4, "fp32", False)
    model = weights.build(run.model)
    model.normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))  # its constants are kept from now on
    assert base._statistics.cache_info().currsize
    again = footprint.measure(run, 4, "fp32", False)
    assert again.curve.tolist() == fresh.curve.tolist()


def test_two_sizes_of_micro_batch_tell_of_all(tmp_path):
    made = search.Search(run_for(tmp_path, "training.micro_batch_size=4", *TWO), 8 << 30, cuda=False)
    for rows in (2, 32):
        exact = memory.estimate(
            footprint.measure(made.run, rows, "fp32", False), Strategy(2), "fp32", 2, 32 // rows, cuda=False
        )
        assert made.estimate(Strategy(2), rows).total == pytest.approx(exact.total, rel=0.01)


@pytest.fixture(scope="module")
def measured_once():
    """footprint.measure, which takes a second for a ViT-L, remembers."""
    known, measure = {}, footprint.measure

    def remembering(run, *rest):
        key = (run.hash(), *rest)
        if key not in known:
            known[key] = measure(run, *rest)
        return known[key]

    return remembering


@pytest.mark.parametrize("gib", [0.5, 3, 6, 12, 40, 80])
def test_the_advice_fits_and_keeps_what_is_asked_where_that_fits(tmp_path, gib, measured_once, monkeypatch):
    """ViT-L, 64 rows a GPU."""
    monkeypatch.setattr(footprint, "measure", measured_once)
    overrides = [
        "model={family: mae, variant: vit_large_patch16}",
        "training.batch_size=128",
        "training.micro_batch_size=64",
        "training.dtype=bf16",
        *TWO,
    ]
    run = run_for(tmp_path, *overrides)
    made = search.Search(run, int(gib * 2**30), cuda=True)
    rows, advice = made.table(), made.advice()
    assert [row.strategy for row in rows][:1] == [Strategy(2)] and {row.strategy for row in rows} >= {
        Strategy(stage) for stage in range(4)
    }
    if advice is None:
        assert gib == 0.5 and not any(row.fits for row in rows)
        return
    if rows[0].fits:
        assert advice == (Strategy(2), 64)
    set_to = [f"{key}={str(value).lower()}" for key, value in search.settings(*advice).items()]
    taken = search.Search(run_for(tmp_path, *overrides, *set_to), int(gib * 2**30), cuda=True).table()[0]
    assert taken.fits and taken.largest == advice[1] and 64 % advice[1] == 0


def test_flops_are_the_formulas_and_time_is_flops_over_rate(tmp_path):
    """Two views of equal chance; a routed teacher's forward beside the student's three units."""
    run = run_for(tmp_path, "train_views=[{kind: centre, size: 0.5}, {kind: random, size: [0.25, 0.75]}]")
    model = base.adapter("mae")(model_options(run.model)[0])
    kinds = [[0.5], [0.25, 0.375, 0.5, 0.625, 0.75]]
    means = []
    for kind, sizes in zip(("centre", "random"), kinds, strict=True):
        found = [
            views.draw([config.ViewSpec(kind=kind, size=size)], model.grid, 1, order.generator(0)) for size in sizes
        ]
        means.append(sum(model.flops(view) for view in found) / len(found))
    work = cost.work(run, {"retain": 10, "forget": 10}, steps=7, measured=20)
    assert work.step == pytest.approx(64 * 4 * sum(means) / 2) and work.steps == 7 and work.evaluation > 0
    found = cost.cost(run, work, peak=1e12, plain=1e11, share=0.25)
    assert found.step == pytest.approx(work.step / (0.25e12 * run.cluster.workers)) and found.training == pytest.approx(
        7 * found.step
    )
    assert found.images == pytest.approx(0.25 * found.floor) == pytest.approx(64 / found.step)
    again = cost.cost(run_for(tmp_path, "training.activation_checkpointing=true"), work, 1e12, 1e11, 0.25)
    assert again.step == pytest.approx(found.step * 5 / 4)
    assert 1e8 < cost.cpu_peak(1, 1, 0.05) < 1e13


def test_a_method_that_trains_the_decoder_counts_the_whole_model(tmp_path):
    def step(*method: str) -> float:
        return cost.work(run_for(tmp_path, *method)).step

    once = step("method={name: pretrain}") / 3
    units = {"max_loss": 3, "noisy_label": 3, "retain_label": 4, "decoupling": 3.5}
    assert {name: step(f"method={{name: {name}}}") / once for name in units} == pytest.approx(units)
    encoder = step() / 4
    units = {"random_encoder": 4, "gradient_projection": 6, "epsilon_constrained": 6}
    assert {name: step(f"method={{name: {name}}}") / encoder for name in units} == pytest.approx(units)
    apart = search.Search(run_for(tmp_path, "method={name: gradient_projection}"), 1 << 40, cuda=True)
    assert {row.strategy.stage for row in apart.table()} == {0, 1, 2} and apart.advice()
    plain, masked = (needed(run_for(tmp_path, f"method.saliency={share}")) for share in ("null", "0.5"))
    count = sum(p.numel() for p in base.adapter("mae")(model_options(run_for(tmp_path).model)[0]).encoder.parameters())
    assert masked.total - plain.total == count


def test_a_first_stage_counts_each_step_or_once(tmp_path):
    model = "model={family: mage, variant: mage_nano_32}"
    each = cost.work(run_for(tmp_path, model), {"retain": 3, "forget": 2}, 1)
    once = cost.work(
        run_for(tmp_path, model, "data.latent_cache=codes", "data.latent_views=4"), {"retain": 3, "forget": 2}, 1
    )
    assert each.once == once.first_stage == 0 and each.step == once.step
    assert each.first_stage / 64 == pytest.approx(once.once / (5 * 4)) and once.once > 0
    # Fronts compute in float32, whatever the rest does.
    run = run_for(tmp_path, model)
    fast, slow = (cost.cost(run, each, 1e12, plain, 0.5) for plain in (1e12, 1e11))
    assert (slow.step - fast.step) * run.cluster.workers == pytest.approx(
        each.first_stage * 0.9 / 0.05e12
    ) and slow.floor < fast.floor
    assert cost.cost(run, once, 1e12, 1e11, 0.5).once == pytest.approx(once.once / (0.05e12 * run.cluster.workers))


def test_sizes_and_kinds_of_gpus():
    run = demo_config(overrides=["cluster.gpus_per_worker=1", "training.dtype=bf16"])
    found = report.device(run, gpu="h200")
    assert (found.memory, found.peak, found.share, found.guessed) == (141 << 30, 989e12, 0.35, False)
    assert report.device(run).guessed == (not torch.cuda.is_available())
    assert report.device(run, "24GiB", "L40S", 0.5).memory == 24 << 30
    half = demo_config(overrides=["cluster.gpus_per_worker=0.5", "cluster.workers=1"])
    assert report.device(half, gpu="h200").memory == (141 << 30) // 2, "the other half is somebody else's"
    for name, key in (
        ("H100", "H100 80GB HBM3"),
        ("A100", "A100"),
        ("a100-80g", "A100-80G"),
        ("NVIDIA L40S", "L40S"),
        ("L4", None),
    ):
        assert cost.known_gpu(name) == key  # as users, Ray and the driver name them
    with pytest.raises(ConfigError, match="known: H100"):
        report.device(run, gpu="abacus")
    with pytest.raises(ConfigError, match="--memory large: write it as 80GiB"):
        report.device(run, "large")


@pytest.mark.parametrize("kept", ["encoded", "decoded", "none"])
def test_the_image_cache_is_what_a_worker_then_holds(tmp_path, kept):
    run = run_for(
        tmp_path,
        f"data.cache={kept}",
        "data.forget={classes: [1], limit: 300}",
        "data.retain={classes: [2], limit: 900}",
    )
    sets, free = selection.sets(run.data, run.seed), 1 << 30
    loader = Loader(run, sets, 4, 32)
    for images in loader.images.values():
        for row in images.set.rows.tolist():
            images.sound(row)
    real, need = loader.images["retain"].cache.bytes, memory.caches(run, sets, free)
    real //= run.cluster.workers if kept == "decoded" else 1  # which are there once a machine
    assert need == pytest.approx(real, rel=0.1), (need, real)
    assert memory.caches(run, sets, need // 2) == need // 2 and memory.caches(run, None, free) == free


def test_what_nobody_can_tell_of_the_caches_is_their_limit(tmp_path):
    run = run_for(tmp_path, "data.cache=decoded", "data.augment=crop_flip")
    assert memory.caches(run, selection.sets(run.data, run.seed), 1 << 30) == 1 << 30


def test_the_latent_cache_is_what_a_worker_then_holds(tmp_path):
    run = run_for(tmp_path, "model={family: mage, variant: mage_nano_32}", f"data.latent_cache={tmp_path}/latents",
        "data.latent_views=2",
                  "data.forget={classes: [1], limit: 30}", "data.retain={classes: [2], limit: 30}")  # fmt: skip
    resolved, model = resolve(run), weights.build(run.model)
    caches = latents.filled(resolved, model, model.take_first_stage(footprint.CPU), footprint.CPU, lambda row: None)
    for each in caches.values():
        for row in each.set.rows.tolist():
            each(row, 0)
    need = memory.caches(run, resolved.sets, 1 << 30)
    assert need == caches["retain"]._loaded.bytes > 0 and memory.caches(run, resolved.sets, 100) == 100


def test_the_caches_of_a_cpu_worker_must_fit_too(tmp_path):
    run = run_for(tmp_path, *TWO)
    size = int(search.Search(run, 1, cuda=False).row(Strategy(2)).estimate.total / search.USABLE) + (1 << 20)
    assert search.Search(run, size, cuda=False, caches=1 << 19).row(Strategy(2)).fits
    assert not search.Search(run, size, cuda=False, caches=2 << 20).row(Strategy(2)).fits
    assert search.Search(run, size, cuda=True, caches=2 << 20).row(Strategy(2)).fits


def test_the_limit_of_the_caches_is_planned_as_it_will_be(tmp_path, monkeypatch):
    monkeypatch.setattr(report.sizes, "host_memory", lambda: 16 << 30)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def planned(*overrides: str, **told: str) -> int:
        run = run_for(tmp_path, *overrides)
        return report._cache_limit(run, report.device(run, **told))

    assert planned("cluster.workers=1") == cache.limit(run_for(tmp_path).data, 1) == 2 << 30
    assert planned("cluster.workers=4") == cache.limit(run_for(tmp_path).data, 4) == 1 << 30
    assert planned(size="1GiB") == 256 << 20
    assert planned("cluster.gpus_per_worker=1", gpu="H100") == cache.DEFAULT  # whose host is not here
    assert planned("data.cache=encoded", "data.cache_bytes=3MiB", size="1GiB") == 3 << 20
    assert planned("cluster.workers=4", "data.cache_bytes=4MiB") == 1 << 20  # decoded: of all workers together
    # Data that is not here takes the limit.
    assert report.report(run_for(tmp_path, "data.train=/nowhere", "data.cache_bytes=6MiB")).caches == 3 << 20


def test_a_method_that_makes_no_sense_is_not_planned(told, written):  # noqa: F811
    vqgan = written("model={family: mage, variant: mage_nano_32}", "method.noise=dataset")
    assert "the inputs of mage are tokens" in refused(told, "plan", vqgan)


def test_plan_and_dry_run_tell_and_write_nothing(told, written, tmp_path):  # noqa: F811  the fixture
    path = written("training.engine=deepspeed", "cluster.workers=2")
    code, out, _ = told("plan", path)
    assert code == 0 and "ZeRO 3" in out and "FLOPs of a step" in out and "advice: as it is" in out
    assert "image cache" in out
    code, out, _ = told("run", path, "--dry-run")
    assert code == 0 and "forget: 12 images" in out and "nothing was written" in out
    assert not (tmp_path / "run").exists()
    code, out, _ = told("plan", written("data.train=/nowhere", "training.steps=null", "training.epochs=2"))
    assert code == 0 and "unknown: the data is not here" in out
    code, out, _ = told("plan", path, "--gpu", "H200")
    assert code == 0 and "note: --gpu H200 is not looked at: cluster.gpus_per_worker is 0" in " ".join(out.split())


def test_what_the_data_at_hand_says_is_planned_also_without_the_rest(tiny_run, tmp_path):
    """Weights are not read, and evaluation data that is not here leaves the training's figures."""
    whole = report.report(tiny_run("training.steps=null", "training.epochs=2"))
    assert (
        whole.sizes == {"forget": 12, "retain": 36}
        and whole.work.steps == 18
        and whole.work.evaluation > 0
        and not whole.notes
    )
    shutil.copytree(
        whole.settings.model.weights, tmp_path / "model", ignore=lambda folder, names: ["weights.safetensors"]
    )
    assert (
        report.report(tiny_run("training.steps=null", "training.epochs=2", f"model.weights={tmp_path}/model")).sizes
        == whole.sizes
    )
    missing = ["model.weights=/nowhere", "model.variant=vit_nano_patch4_32", "evaluation.data=/nowhere/else"]
    part = report.report(tiny_run("training.steps=null", "training.epochs=2", *missing))
    assert part.sizes == whole.sizes and part.work.steps == 18 and part.work.evaluation is None
    assert part.notes == ["not here: model.weights /nowhere; the shape planned for is model.variant vit_nano_patch4_32"]


def test_a_feature_network_that_nobody_knows_is_told(tiny_run):
    with pytest.raises(ConfigError, match="evaluation.features: no network 'resnet'; known: efficientnet_lite0"):
        report.report(tiny_run("evaluation.features=resnet"))


def test_dry_run_refuses_what_would_not_run(told, written):  # noqa: F811
    err = refused(told, "run", written("training.batch_size=256"), "--dry-run", "--memory", "9MiB")
    assert "a worker needs" in err and "--set training.micro_batch_size=" in err
    assert "nothing that can be set here" in refused(told, "run", written(), "--dry-run", "--memory", "10KiB")
    assert "500 CPUs are asked for" in refused(
        told, "run", written("training.engine=deepspeed", "cluster.cpus_per_worker=500"), "--dry-run"
    )
    assert "no Ray cluster answers" in refused(
        told, "run", written("training.engine=deepspeed", "cluster.address=127.0.0.1:1"), "--dry-run"
    )
    assert "no class 'unicorn'" in refused(told, "run", written("data.forget.classes=[unicorn]"), "--dry-run")
