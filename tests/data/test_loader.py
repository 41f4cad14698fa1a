"""Micro-batches are functions of their number, whatever is cached, read ahead, damaged or far away."""

import io
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from PIL import Image
from support.images import encode, tiny_table

from unlearn.data import selection, shards
from unlearn.data.cache import ImageCache
from unlearn.data.decode import decode
from unlearn.data.images import Images
from unlearn.data.loader import Loader
from unlearn.data.scaling import crop_flip, fit, scaled
from unlearn.data.storage import Storage
from unlearn.errors import DataError


def load(run) -> Loader:
    return Loader(run, selection.sets(run.data, run.seed), grid=4, size=32)


def same(a, b) -> bool:
    views = torch.equal(a.view.visible, b.view.visible) and torch.equal(a.view.hidden, b.view.hidden)
    return torch.equal(a.images, b.images) and views and (a.retain, a.seed) == (b.retain, b.seed)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize("cache", ["none", "encoded", "decoded"])
@pytest.mark.parametrize("limit", ["0", "30KB", "1GiB"])
def test_a_batch_is_a_function_of_its_number(tiny_run, cache, augment, limit):
    run = tiny_run(
        f"data.cache={cache}",
        f"data.cache_bytes={limit}",
        f"data.augment={augment}",
        "data.shuffle_rows=8",
        "data.decode_threads=4",
    )
    plain = load(tiny_run("data.cache=none", f"data.augment={augment}", "data.shuffle_rows=8"))
    loader, numbers = load(run), list(range(14))  # more than one pass over either set
    expected = [plain.batch(n) for n in numbers]
    assert all(same(a, b) for a, b in zip(loader.batches(numbers), expected, strict=True))
    assert all(same(loader.batch(n), expected[n]) for n in reversed(numbers))
    assert [same(b, expected[n]) for n, b in zip((9, 4), loader.batches([9, 4]), strict=True)] == [True, True]
    assert len({b.seed for b in expected}) == len(numbers)


def test_a_batch_holds_the_rows_that_the_order_says(tiny_run):
    loader = load(tiny_run("training.forget_fraction=0.25"))
    batch = loader.batch(3)
    rows = [("retain", r) for r in loader.streams["retain"].take(18, 6)] + [
        ("forget", r) for r in loader.streams["forget"].take(6, 2)
    ]
    assert batch.retain == 6 and batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.uint8
    for image, (name, row) in zip(batch.images, rows, strict=True):
        assert (row < 12) == (name == "forget")
        encoded = tiny_table(row // 16 * 16, 16)["image"][int(row) % 16]["bytes"].as_py()
        pixels = fit(np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")), 32)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert load(tiny_run("training.forget_fraction=0")).batch(0).retain == 8


def test_seeds_and_runs_differ(tiny_run):
    assert not same(load(tiny_run()).batch(0), load(tiny_run("seed=4")).batch(0))


def test_batches_come_from_s3(tiny_run, tiny_shards, s3):
    for name in Storage(tiny_shards).files():
        Storage(s3).write(name, Storage(tiny_shards).read(name))
    here, there = load(tiny_run()), load(tiny_run(f"data.train={s3}"))
    assert all(same(a, b) for a, b in zip(there.batches(range(6)), map(here.batch, range(6)), strict=True))


@pytest.mark.parametrize("cache", ["none", "decoded"])
@pytest.mark.parametrize("limit, together", [("1GiB", True), ("10KB", False)])
def test_the_row_groups_of_a_batch_are_read_from_s3_several_at_a_time_where_there_is_room(
    tiny_run, tiny_shards, s3, monkeypatch, cache, limit, together
):
    for name in Storage(tiny_shards).files():
        Storage(s3).write(name, Storage(tiny_shards).read(name))
    here = load(tiny_run())
    expected, read, reading, most = [here.batch(n) for n in range(3)], Images._row_group, set(), 0

    def slowly(images: Images, group: int):
        nonlocal most
        reading.add(group)
        most = max(most, len(reading))
        time.sleep(0.1)
        reading.remove(group)
        return read(images, group)

    monkeypatch.setattr(Images, "_row_group", slowly)
    there = load(tiny_run(f"data.train={s3}", f"data.cache={cache}", f"data.cache_bytes={limit}"))
    assert all(same(there.batch(n), batch) for n, batch in enumerate(expected))
    assert (most > 1) == together


PIXELS = np.random.default_rng(0).integers(0, 256, (23, 37, 3), np.uint8)


@pytest.mark.parametrize(
    "data",
    [encode(PIXELS), encode(PIXELS, mode="L"), encode(PIXELS, mode="P"), encode(PIXELS, mode="RGBA"),
        encode(PIXELS, mode="1"),
     encode(PIXELS, "JPEG"), encode(PIXELS, "JPEG", "L"), encode(PIXELS, "JPEG", "CMYK"),
     encode(PIXELS, "JPEG", progressive=True),
     encode(PIXELS, "WEBP", lossless=True), encode(PIXELS, "BMP"), encode(PIXELS[:1, :1], "JPEG")],
    ids=["png", "png-grey", "palette", "alpha", "bits", "jpeg", "jpeg-grey", "cmyk", "progressive", "webp", "bmp",
        "one-pixel"],
)  # fmt: skip
def test_every_kind_of_image_decodes_as_pil_does(data):
    image = decode(memoryview(data))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= 1  # two builds of one JPEG decoder
    if data[:2] == b"\xff\xd8" and Image.open(io.BytesIO(data)).mode == "RGB":
        assert np.array_equal(image, simplejpeg.decode_jpeg(data, "RGB"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damage_is_always_the_same_two_exceptions(format):
    whole, rng = encode(PIXELS, format), np.random.default_rng(1)
    for trial in range(400):
        data = bytearray(whole[: rng.integers(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(3 if data else 0):
            data[rng.integers(min(len(data), 60 if trial % 3 == 1 else len(data)))] = rng.integers(256)
        try:
            assert decode(bytes(data)).dtype == np.uint8
        except (ValueError, OSError):
            pass
    for broken in (b"", b"\xff\xd8", whole[:-40] if format in ("PNG", "JPEG") else b"x"):
        with pytest.raises((ValueError, OSError)):
            decode(broken)


@pytest.mark.parametrize("height, width", [(32, 32), (31, 100), (100, 31), (1, 1), (1, 50), (33, 32), (64, 48)])
def test_fit_and_crop_flip_give_the_size_and_are_deterministic(height, width):
    image = np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8)
    assert fit(image, 32).shape == crop_flip(image, 32, np.random.default_rng(0)).shape == (32, 32, 3)
    crops = [crop_flip(image, 32, np.random.default_rng(s)) for s in (5, 5, 6)]
    assert np.array_equal(crops[0], crops[1]) and (image.size == 3 or not np.array_equal(crops[0], crops[2]))


@pytest.mark.parametrize(
    "kind, size",
    [
        ("noise", (224, 127)),
        ("noise", (33, 19)),
        ("noise", (700, 397)),
        ("smooth", (224, 127)),
        ("smooth", (224, 224)),  # noise overshoots more where one axis is scaled up and the other down
    ],
)
def test_scaling_is_that_of_pil_but_for_two_levels(kind, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 170, 3), np.uint8)
    if kind == "smooth":
        image = np.asarray(Image.fromarray(image[:9, :7]).resize((170, 300), Image.Resampling.BICUBIC))  # read-only
    of_pil = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(scaled(image, *size) - of_pil).max() <= 2
    part = image[60:, 34:]  # of another array, and not contiguous
    of_pil = np.asarray(Image.fromarray(part).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(scaled(part, *size) - of_pil).max() <= 2


def test_fit_takes_the_middle_and_a_flat_image_stays_flat():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    assert (fit(wide, 32) == 200).all()
    assert (crop_flip(np.full((40, 50, 3), 77, np.uint8), 32, np.random.default_rng(0)) == 77).all()


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_a_damaged_image_is_skipped_counted_and_named(tiny_run, damaged, cache):
    settings = [f"data.train={damaged}", "data.forget=null", f"data.cache={cache}", "data.max_bad_images=2"]
    loader = load(tiny_run(*settings))
    batches = list(loader.batches(range(4)))  # two passes
    assert loader.bad_images == {"retain": ["img-003", "img-009"]}
    assert all(same(a, b) for a, b in zip(batches, map(load(tiny_run(*settings)).batch, range(4)), strict=True))
    order = loader.streams["retain"].take(0, 16).tolist()
    images = torch.cat([batches[0].images, batches[1].images])
    assert torch.equal(images[order.index(3)], images[order.index(4)]) and torch.equal(
        images[order.index(9)], images[order.index(10)]
    )


def test_more_damage_than_allowed_stops_and_names_the_images(tiny_run, damaged):
    run = tiny_run(f"data.train={damaged}", "data.forget=null", "data.max_bad_images=1")
    with pytest.raises(
        DataError, match=r"2 image\(s\) of .*damaged do not decode: img-00.*, img-00.*data.max_bad_images \(now 1\)"
    ):
        list(load(run).batches(range(2)))


@pytest.mark.timeout(30)
def test_a_set_of_damaged_images_alone_is_told_and_not_searched_for_ever(tiny_run, damaged):
    run = tiny_run(
        f"data.train={damaged}", "data.forget=null", "data.retain={ids: [img-003, img-009]}", "data.max_bad_images=9"
    )
    with pytest.raises(DataError, match="2 image.* do not decode"):
        load(run).batch(0)


def test_an_image_that_another_thread_has_decoded_meanwhile_is_no_damaged_one(tiny_run):
    run = tiny_run("data.cache=decoded")
    images = load(run).images["retain"]
    row = int(images.set.rows[0])
    first, get, looks = images[row].copy(), images._shelf.get, []
    # Looked at just before the other thread is done.
    images._shelf.get = lambda row: looks.append(row) or (get(row) if len(looks) > 1 else None)
    assert np.array_equal(images[row], first) and len(looks) == 2 and not images.bad


def test_many_threads_read_uncached_row_groups_without_losing_one(tiny_run, tmp_path):
    for number in range(3):
        pq.write_table(tiny_table(number * 16, 16), tmp_path / f"{number}.parquet", row_group_size=2)
    manifest = shards.index(str(tmp_path))
    run = tiny_run(f"data.train={tmp_path}", "data.cache=none", "data.shuffle_rows=1", "data.forget=null")
    images, expected, wrong = Images(selection.sets(run.data, 0)["retain"], run.data, ImageCache(0)), [], []
    for group in range(24):
        expected += [bytes(v) for v in shards.images(manifest.read(group, ["image"]))]

    def read(rows):
        try:
            wrong.extend(row for row in rows if images.read(row) != expected[row])
        except Exception as e:
            wrong.append(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=read, args=(np.random.default_rng(i).integers(0, 48, 400).tolist(),))
            for i in range(8)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_leaving_the_batches_early_ends_the_threads(tiny_run):
    before = set(threading.enumerate())  # whatever other tests of this process have left
    batches = load(tiny_run()).batches(iter(range(10**9)))
    next(batches)
    assert [t for t in threading.enumerate() if t not in before and t.name.startswith("decode")]
    batches.close()
    assert not [t for t in threading.enumerate() if t not in before and t.name.startswith("decode")]
