"""The caches of a worker keep within data.cache_bytes, whatever the data and however many threads."""

import json
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import encode, tiny_table

from unlearn import config, sizes
from unlearn.data import cache, selection, shards
from unlearn.data.cache import ENTRY, ImageCache
from unlearn.data.images import Images
from unlearn.data.loader import Loader
from unlearn.data.recent import Recent

LIMIT, SLACK = 2 << 20, 20 << 20
# For each configuration, prints how many bytes more than after a first look the process had at most in three epochs.
READER = """
import json, sys
from unlearn import config
from unlearn.data import selection
from unlearn.data.loader import Loader

def held():
    lines = [line.split() for line in open("/proc/self/status")]
    return sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssShmem:")) << 10

def read(settings, epochs):
    loader = Loader(settings, selection.sets(settings.data, 0), grid=4, size=160)
    peak, each = 0, len(loader.images["retain"].set) // settings.micro_batch
    for number, batch in enumerate(loader.batches(range(epochs * each))):
        peak = max(peak, held()) if number % 10 == 0 else peak
    return peak

settings = [config.parse(tree) for tree in json.loads(sys.argv[1])]
read(settings[0], 1)
before = held()
print(json.dumps([read(each, 3) - before for each in settings]))
"""


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> str:
    """A folder of 400 PNGs of noise, 200 x 160: 39 MB as they are stored, 31 MB cut to 160 x 160; 10 in a row group."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    with pq.ParquetWriter(folder / "0.parquet", shards.SCHEMA, compression="none") as writer:
        for start in range(0, 400, 10):
            rows = [{"image": {"bytes": encode(rng.integers(0, 256, (160, 200, 3), np.uint8), compress_level=0),
                        "path": None},
                     "label": 0, "id": str(start + i), "subject": "s"} for i in range(10)]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, shards.SCHEMA), row_group_size=10)
    shards.index(str(folder))
    return str(folder)


def test_memory_is_flat_however_long_it_reads(noise, tmp_path):
    """Three epochs of a data set many times as large as the limit; and a control, where the limit is larger still."""

    def tree(kept: str, limit: int) -> dict:
        data = {"train": noise, "cache": kept, "cache_bytes": limit, "shuffle_rows": 20}
        training = {"steps": 1, "batch_size": 10}
        return {"run_dir": str(tmp_path), "data": data, "training": training, "method": {"name": "pretrain"}}

    limited = [tree(kept, LIMIT) for kept in ("none", "encoded", "decoded")]
    runs = [tree("none", 0), *limited, *(tree(kept, 1 << 30) for kept in ("encoded", "decoded"))]
    done = subprocess.run([sys.executable, "-c", READER, json.dumps(runs)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    nothing, none, encoded, decoded, all_encoded, all_decoded = json.loads(done.stdout)
    assert max(none, encoded, decoded) < LIMIT + SLACK and nothing < SLACK, done.stdout
    assert min(all_encoded, all_decoded) > LIMIT + SLACK, done.stdout


def images(tiny_run, limit: int, *overrides: str, size: int | None = 32) -> Images:
    run = tiny_run("data.forget=null", *overrides)
    return Images(selection.sets(run.data, 0)["retain"], run.data, ImageCache(limit), size)


def test_a_decoded_image_takes_what_it_has_after_it_was_cut_to_size(tiny_run):
    found = images(tiny_run, 1 << 30, "data.cache=decoded")
    for row in found.set.rows.tolist():
        image = found[row].copy()
        assert found[row].base is not None and np.array_equal(found[row], image)
    assert found.cache.bytes == len(found.set) * 3 * 32 * 32 and not found._shelf.images
    whole = images(tiny_run, 1 << 30, "data.cache=decoded", size=None)  # for crops
    assert sum(whole[row].nbytes for row in whole.set.rows.tolist()) == whole.cache.bytes


def test_an_encoded_image_takes_its_own_bytes_and_no_row_group_stays(tiny_run):
    found = images(tiny_run, 1 << 30, "data.cache=encoded")
    found[0]
    kept = found._shelf.images
    assert sorted(kept) == list(range(8)) and all(type(entry) is bytes for entry in kept.values())
    assert found.cache.bytes == sum(len(entry) + ENTRY for entry in kept.values())


@pytest.mark.parametrize("kept", ["none", "encoded", "decoded"])
@pytest.mark.parametrize("limit", [0, 5_000, 40_000, 90_000])
def test_what_is_kept_is_counted_and_within_the_limit_under_many_threads(tiny_run, kept, limit):
    found, plain = images(tiny_run, limit, f"data.cache={kept}"), images(tiny_run, 0, "data.cache=none")
    expected = [plain[row] for row in range(48)]
    groups, threads = [plain._row_group(group) for group in range(6)], 8
    # Each thread may be about to drop an image as it was stored, for the decoded one that has taken its place.
    replaced = threads * max(ENTRY + len(image) for stored, _ in groups for image in stored)
    most, wrong = limit + max(size for _, size in groups) + replaced, []

    def read(seed: int) -> None:
        for row in np.random.default_rng(seed).integers(0, 48, 100).tolist():
            if not np.array_equal(found[row], expected[row]):
                wrong.append(row)
            if found.cache.bytes > most:
                wrong.append(found.cache.bytes)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and not found.bad
    single = sum(ENTRY + len(entry) for entry in found._shelf.images.values()) + found.cache.decoded
    assert single + found.cache.row_groups.bytes == found.cache.bytes and single <= found.cache.room
    assert found.cache.row_groups.bytes == sum(size for _, size in found.cache.row_groups._held.values())
    assert bool(single) == (kept != "none" and limit > 0)


def test_the_sets_of_a_worker_share_one_limit(tiny_run):
    run = tiny_run("data.cache=decoded", "data.cache_bytes=40KB")
    loader = Loader(run, selection.sets(run.data, 0), grid=4, size=32)
    for _ in loader.batches(range(20)):
        pass
    assert loader.images["retain"].cache is loader.images["forget"].cache
    shelf, decoded = loader.images["retain"]._shelf, loader.images["retain"].cache.decoded
    assert shelf is loader.images["forget"]._shelf
    assert 20_000 < decoded + sum(len(entry) + ENTRY for entry in shelf.images.values()) <= 30 << 10


@pytest.mark.parametrize("kept", ["none", "encoded", "decoded"])
def test_the_splits_of_a_folder_are_told_apart(tiny_run, tmp_path, kept):
    """They have one URI, and row groups of the same numbers, whose images no checksum tells apart once they are
    read."""
    for split, first, count in (("train", 0, 24), ("test", 40, 8)):
        pq.write_table(tiny_table(first, count), tmp_path / f"{split}-0.parquet", row_group_size=8)
        shards.index(str(tmp_path), split)
    run = tiny_run(f"data.cache={kept}")
    for limit in (1_000, 1 << 20):  # without and with room for single images
        together, found = ImageCache(limit), {}
        for split in ("train", "test"):
            rows = selection.select(shards.load(str(tmp_path), split), config.Rows(), 0, "retain")
            found[split] = rows, Images(rows, run.data, together)
        for row in range(8):
            for rows, images in found.values():
                alone = Images(rows, run.data, ImageCache(0))
                assert np.array_equal(images[row], alone[row])
    sets = {name: rows for name, (rows, _) in found.items()}
    assert cache.needed_bytes(sets, run.data, 32) > cache.needed_bytes({"test": sets["test"]}, run.data, 32)


def test_the_values_used_last_stay_and_the_newest_always():
    recent, read = Recent(10), []

    def get(key: str, size: int) -> str:
        return recent.get(key, lambda: (read.append(key), (key.upper(), size))[1])

    assert [get(key, 4) for key in "abacab"] == list("ABACAB") and read == list("abcb") and recent.bytes == 8
    assert get("large", 99) == "LARGE" and recent.bytes == 99 and get("large", 99) == "LARGE"
    assert get("a", 4) == "A" and recent.bytes == 4
    get("b", 4)
    recent.resize(5)
    assert recent.bytes == 4 and get("b", 4) == "B" and read == [*"abcb", "large", *"ab"]
    recent.drop("b")
    recent.drop("nothing")
    assert recent.bytes == 0


def test_a_value_that_many_threads_want_is_read_once_and_a_failed_read_leaves_nothing():
    recent, read, met = Recent(10), [], threading.Barrier(6)

    def want(_: int) -> str:
        met.wait(600)
        return recent.get("a", lambda: (time.sleep(0.05), read.append("a"), ("A", 1))[2])

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(want, range(6))) == {"A"} and read == ["a"]
    with pytest.raises(ZeroDivisionError):
        recent.get("b", lambda: (1 // 0, 1))
    assert recent.bytes == 1 and recent.get("b", lambda: ("B", 1)) == "B"


def test_the_limit_is_what_the_configuration_says_or_a_part_of_the_machine(tiny_run, monkeypatch):
    for text, size in (("1.5MiB", 3 << 19), ("4096", 4096), ("0", 0)):
        assert cache.limit(tiny_run(f"data.cache_bytes={text}").data, 4) == size
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    data = tiny_run().data
    assert data.cache_bytes is None and 0 < cache.limit(data, 1) <= cache.DEFAULT
    monkeypatch.setattr(sizes, "host_memory", lambda: 16 << 30)
    assert [cache.limit(data, workers) for workers in (1, 2, 4)] == [2 << 30, 2 << 30, 1 << 30]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # eight workers on this machine, of how many nodes ever
    assert cache.limit(data, 4) == 512 << 20


def test_a_limit_that_makes_reading_slow_is_told(tiny_run, caplog):
    def warned(*overrides: str) -> bool:
        caplog.clear()
        run = tiny_run(*overrides)
        Loader(run, selection.sets(run.data, 0), grid=4, size=32)
        return any(
            "data.cache_bytes" in each.message and "data.shuffle_rows" in each.message for each in caplog.records
        )

    caplog.set_level(logging.WARNING)
    assert not warned() and not warned("data.cache=none")
    for kept in ("none", "encoded", "decoded"):
        assert warned(f"data.cache={kept}", "data.cache_bytes=60KB")
        # Of this window the few row groups in use have room.
        assert not warned(f"data.cache={kept}", "data.cache_bytes=120KB", "data.shuffle_rows=1")
