"""What a frozen first stage makes of images, kept in files: the same batches as without, made once, by all workers
together."""

import gc
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import export, tiny_config, worker
from support.workers import together

from jobs.train import check
from unlearn import config, sizes
from unlearn.data.loader import Loader
from unlearn.errors import ConfigError, DataError
from unlearn.methods import base as methods
from unlearn.models import weights
from unlearn.run import resolve
from unlearn.training import latents, loop, metrics
from unlearn.training.engine import Objective, TorchEngine
from unlearn.training.latents import LatentCache

CPU = torch.device("cpu")
SMALL = {
    "image_size": 32, "width": 16, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2,
    "codes": 32, "code_width": 4, "vocabulary": 33, "class_token": 32, "channels": [4, 4, 8], "layers": 1,
    "norm_groups": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A generator over tokens, with random weights."""
    path = str(tmp_path_factory.mktemp("model") / "tokens")
    weights.write(weights.build(config.Model(family="mage", options=SMALL), seed=1), path, {})
    return path


@pytest.fixture
def make(tiny_shards, folder, tmp_path):
    """make("run", "a.b=value", ...) -> RunConfig that has its latent cache in `tmp_path / latents`."""

    def run(name: str, *overrides: str) -> config.RunConfig:
        own = ["model.family=mage", f"data.latent_cache={tmp_path}/latents", "data.latent_views=3"]
        return tiny_config(tmp_path / name, tiny_shards, folder, *own, *overrides)

    return run


def files(run: config.RunConfig) -> dict[str, tuple[int, int]]:
    """Every file of latents: its inode and when it was last written."""
    return {
        str(p.relative_to(run.data.latent_cache)): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in Path(run.data.latent_cache).rglob("*.safetensors")
    }


def kept(run: config.RunConfig) -> tuple[dict[str, LatentCache], torch.nn.Module, torch.nn.Module]:
    """(the latent cache of every set, all made; the model; its first stage)."""
    model = weights.build(run.model)
    first_stage = model.take_first_stage(CPU)
    return latents.filled(resolve(run), model, first_stage, CPU, lambda row: None), model, first_stage


@pytest.mark.parametrize("cache", ["none", "encoded", "decoded"])
def test_batches_of_kept_latents_are_what_the_first_stage_makes_of_the_images(make, cache):
    run = make("run", f"data.cache={cache}", "train_views=[{kind: random, size: 0.5}]")
    caches, model, first_stage = kept(run)
    cached = Loader(run, resolve(run).sets, model.grid, 32, caches)
    plain = Loader(run, resolve(run).sets, model.grid, 32)
    objective = Objective(model, methods.create(run.method), None)
    seen = set()
    for number in range(12):
        batch, pixels = cached.batch(number), plain.batch(number)
        assert batch.images.dtype == torch.int16 and batch.retain == pixels.retain
        inputs = objective.on(batch, CPU, torch.float32).images
        with torch.no_grad():
            expected = first_stage(model.normalise(pixels.images), batch.view)
        assert inputs.dtype == torch.int64 and torch.equal(inputs, expected)
        seen.add(tuple(batch.view.hidden[0].tolist()))
        assert torch.equal(batch.images, cached.batch(number).images)
    assert len(seen) == run.data.latent_views


def mapped(folder: str) -> set[str]:
    """Files below a folder that this process has mapped into its memory."""
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if folder in line}


@pytest.mark.parametrize("limit", ["0", "20KB", "1GiB"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_latents_are_in_memory_within_the_limit_and_the_batches_stay_the_same(make, s3, tmp_path, where, limit):
    folder = f"{tmp_path}/own" if where == "local" else s3
    same = ("data.decode_threads=4", "training.batch_size=16")
    free, run = make("free", *same), make("limited", f"data.latent_cache={folder}", f"data.cache_bytes={limit}", *same)
    caches, model, _ = kept(free)
    plain = Loader(free, resolve(free).sets, model.grid, 32, caches)
    caches, model, _ = kept(run)
    limited, loaded = Loader(run, resolve(run).sets, model.grid, 32, caches), caches["retain"]._loaded
    assert caches["forget"]._loaded is loaded
    one = 8 * 3 * 2 * 64 * 2  # bytes of the latents of a whole row group
    for number, batch in enumerate(limited.batches(range(8))):
        assert torch.equal(batch.images, plain.batch(number).images)
        assert loaded.bytes <= max(sizes.parse(limit), one)
        assert len(mapped(folder)) <= max(sizes.parse(limit) // one, 1) + 4  # those that threads still read from
    gc.collect()
    assert len(mapped(folder)) == (len(loaded._held) if where == "local" else 0) and (len(loaded._held) > 1) == (
        limit != "0"
    )


def test_a_second_run_takes_what_a_first_has_made(make, monkeypatch):
    first, second = make("first"), make("second")
    worker(first)
    before = files(first)
    monkeypatch.setattr(LatentCache, "_make", lambda *args: pytest.fail("made again"))
    worker(second)
    assert before and files(second) == before
    assert [row["loss"] for row in metrics.read(first.run_dir)] == [row["loss"] for row in metrics.read(second.run_dir)]
    a, b = (load_file(f"{export(run)}/weights.safetensors") for run in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(
        torch.equal(a[n], t) for n, t in weights.build(first.model).state_dict().items() if not n.startswith("encoder.")
    )


def test_what_is_missing_alone_is_made(make):
    run = make("run")
    kept(run)
    before = files(run)
    gone = sorted(before)[2]
    os.remove(Path(run.data.latent_cache, gone))
    kept(run)
    after = files(run)
    assert after.keys() == before.keys() and {n for n in after if after[n] != before[n]} == {gone}


@pytest.mark.parametrize("workers", [1, 2, 3, 50])
def test_the_shares_of_the_workers_are_the_whole_and_do_not_overlap(make, workers):
    """Also where a worker looks when another has finished."""
    run = make(f"run-{workers}", f"data.latent_cache={make('x').data.latent_cache}-{workers}")
    model = weights.build(run.model)
    rows = resolve(run).sets["retain"]
    caches = LatentCache(run, rows, model, model.take_first_stage(CPU))
    made = []
    for rank in range(workers):
        before = set(files(run))
        caches.fill(CPU, rank, workers, lambda done, of: made.append((done, of)))
        share = len(set(files(run)) - before)
        assert abs(share - len(rows.touched) / workers) < 1
    assert len(files(run)) == len(rows.touched) == len(made)
    assert [tuple(caches(int(row), 1).shape) for row in rows.rows] == [(2, 64)] * len(rows)


def test_two_workers_make_and_use_them_as_one_does(make):
    """Real processes: what they learn is what one plain process learns, and their files are its files."""
    alone = make("alone", "training.micro_batch_size=4", "data.latent_cache=" + make("x").data.latent_cache + "-alone")
    shared = make("shared", "training.micro_batch_size=4", "training.engine=deepspeed", "cluster.workers=2")
    worker(alone)
    together([shared], 2)
    assert files(alone).keys() == files(shared).keys()
    for name in files(alone):
        assert Path(alone.data.latent_cache, name).read_bytes() == Path(shared.data.latent_cache, name).read_bytes()
    for row, other in zip(metrics.read(alone.run_dir), metrics.read(shared.run_dir), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_another_first_stage_other_views_or_rows_get_files_of_their_own(make, tiny_shards, tmp_path):
    other = str(tmp_path / "other")
    weights.write(weights.build(config.Model(family="mage", options=SMALL), seed=2), other, {})
    different = [(), (f"model.weights={other}",), ("data.latent_views=2",),
        ("train_views=[{kind: centre, size: 0.5}]",),
                 ("data.forget.classes=[cat]",)]  # fmt: skip
    names = []
    for number, overrides in enumerate(different):
        run = make(f"run-{number}", *overrides)
        before = set(files(run))
        kept(run)
        names.append(set(files(run)) - before)
    assert (
        all(names) and len({Path(name).parent for new in names for name in new}) == 4
    )  # other rows lie beside the first
    assert not set.intersection(*names)


def test_a_damaged_file_is_told(make):
    run = make("run")
    caches, *_ = kept(run)
    for path in Path(run.data.latent_cache).rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"\.safetensors is damaged: delete it, and it is made anew"):
        caches["retain"](int(caches["retain"].set.rows[0]), 0)


def test_a_file_that_is_gone_is_told(make):
    run = make("run")
    caches, *_ = kept(run)
    for path in Path(run.data.latent_cache).rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match=r"\.safetensors is gone: start the run again, and it is made anew"):
        caches["retain"](int(caches["retain"].set.rows[0]), 0)


def test_augmentation_cannot_be_kept(make):
    check(make("run"))
    with pytest.raises(ConfigError, match="data.augment: with data.latent_cache every image is seen as it is"):
        check(make("run", "data.augment=crop_flip"))


class Halves(torch.nn.Module):
    """A first stage whose latents are numbers: each pixel's third, its hole in zeros."""

    def forward(self, images, view):
        return torch.where(view.pixel_mask(images.shape[-1]), 0, images / 3)


def test_latents_that_are_numbers_are_kept_in_half_precision(make):
    run = make("run")
    model, first_stage = weights.build(run.model), Halves()
    caches = LatentCache(run, resolve(run).sets["retain"], model, first_stage)
    caches.fill(CPU, 0, 1, lambda done, of: None)
    found, expected = caches(int(caches.set.rows[5]), 2), Loader(run, resolve(run).sets, 8, 32).images["retain"]
    image = model.normalise(torch.from_numpy(expected[int(caches.set.rows[5])].copy()).permute(2, 0, 1)[None])
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, first_stage(image, caches.views[2])[0].half())


def test_damaged_images_are_counted_and_named_also_by_a_run_that_finds_their_latents(make, damaged):
    bad = [f"data.train={damaged}", "data.forget=null", "method.name=pretrain"]
    rows = lambda run: metrics.read(run.run_dir)[-1]["bad_images"]  # noqa: E731
    for name in ("makes", "finds"):
        run = make(name, *bad, "data.max_bad_images=2")
        worker(run)
        assert rows(run) == 2 and json.loads(Path(run.run_dir, "bad_images.json").read_text()) == {
            "retain": ["img-003", "img-009"]
        }
    with pytest.raises(
        DataError,
        match=r"2 image\(s\) of .*damaged do not decode: img-00[39], img-00[39] .found when their latents were made",
    ):
        worker(make("strict", *bad, "data.max_bad_images=1"))


def test_the_first_stage_is_gone_before_training(make, monkeypatch):
    first_stages, begin = [], loop.make_engine
    taken = weights.base.Adapter.take_first_stage

    def remembered(self, device):
        first_stage = taken(self, device)
        first_stages.append(weakref.ref(first_stage))
        return first_stage

    def engine(*arguments):
        gc.collect()
        assert first_stages and not [first_stage for first_stage in first_stages if first_stage() is not None]
        return begin(*arguments)

    monkeypatch.setattr(weights.base.Adapter, "take_first_stage", remembered)
    monkeypatch.setattr(loop, "make_engine", engine)
    worker(make("run"))


def test_the_first_stage_is_let_go(make):
    run = make("run")
    caches, model, first_stage = kept(run)
    assert model.first_stage is None and all(
        each.first_stage is None and each.model is None for each in caches.values()
    )
    student = weights.build(run.model)
    engine = TorchEngine(
        Objective(student, methods.create(run.method), None), list(student.encoder.parameters()), run.training, CPU
    )
    assert (
        engine.objective.on(Loader(run, resolve(run).sets, 8, 32, caches).batch(0), CPU, torch.float32).images.dtype
        == torch.int64
    )
