"""Decoded images are kept once a machine: by one process for all, whole or not at all, private, and gone after the
last."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unlearn import config
from unlearn.data import cache, images, pixels, selection
from unlearn.data.images import Images
from unlearn.data.loader import Loader
from unlearn.data.pixels import CLAIMED, EMPTY, READY
from unlearn.run import resolve
from unlearn.training.loop import worker

# Decodes the images of a run, as the first worker of a machine, and stays; the seventh image ends it half written where
# it is told so.
FIRST = """
import json, os, signal, sys
from unlearn import config
from unlearn.data import cache, pixels, selection
from unlearn.data.images import Images

tree, memory, killed = json.loads(sys.argv[1])
pixels.MEMORY, write, left = memory, os.pwrite, [6]

def half(file, data, place):
    left[0] -= 1
    if killed and left[0] < 0:
        write(file, data[: len(data) // 2], place)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, data, place)

os.pwrite = half
settings = config.parse(tree)
kept = cache.image_cache(settings.data, 2)
for name, rows in selection.sets(settings.data, settings.seed).items():
    found = Images(rows, settings.data, kept, 32)
    for row in rows.rows.tolist():
        found[row]
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(pixels, "MEMORY", str(tmp_path))
    yield tmp_path
    gc.collect()


@pytest.fixture
def first(memory):
    """first(run, killed) -> a process that has decoded the images of the run, or was killed over it."""
    started = []

    def start(run: config.RunConfig, killed: bool = False) -> subprocess.Popen:
        told = json.dumps([run.model_dump(mode="json"), str(memory), killed])
        started.append(
            subprocess.Popen([sys.executable, "-c", FIRST, told], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        assert started[-1].stdout.readline() == (b"" if killed else b"\n")
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def folders(memory: Path) -> list[Path]:
    return sorted((memory / f"unlearn-{os.getuid()}" / "pixels").glob("*"))


def test_the_second_process_decodes_nothing_and_trains_to_the_same_weights(
    tiny_run, tmp_path, first, memory, monkeypatch
):
    plain, run = (tiny_run(f"data.cache={kept}", f"run_dir={tmp_path}/{kept}") for kept in ("none", "decoded"))
    worker(resolve(plain))
    process = first(run)
    assert [p.stat().st_mode & 0o777 for p in (folders(memory)[0].parent, *folders(memory)[0].iterdir())] == [
        0o700,
        0o600,
        0o600,
    ]
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded again"))
    worker(resolve(run))
    step = "checkpoints/step-00000004"
    weights = [[f.read_bytes() for f in sorted(Path(r.run_dir, step).glob("*.safetensors"))] for r in (plain, run)]
    assert weights[0] == weights[1] and weights[0]

    other = Loader(run, selection.sets(run.data, run.seed), 4, 32)
    process.communicate(b"")
    assert len(folders(memory)) == 2, "still used here"
    assert other.batch(0).images.shape == (8, 3, 32, 32)
    del other
    gc.collect()
    assert folders(memory) == []
    monkeypatch.setattr(images, "decode", decode)
    worker(resolve(tiny_run("data.cache=decoded", f"run_dir={tmp_path}/last")))
    gc.collect()
    assert folders(memory) == [], "a run leaves nothing"


def test_a_process_that_is_killed_over_an_image_leaves_no_half_of_it(tiny_run, first, memory):
    run = tiny_run("data.forget=null", "data.cache=decoded", "data.cache_bytes=10MiB")
    assert first(run, killed=True).wait() == -signal.SIGKILL
    rows = selection.sets(run.data, 0)["retain"]
    found = Images(rows, run.data, cache.image_cache(run.data, 2), 32)
    states = found._shelf.pixels.states
    assert states[:8].tolist() == [READY] * 6 + [CLAIMED, EMPTY]
    plain = Images(rows, run.data.model_copy(update={"cache": "none"}), cache.ImageCache(0), 32)
    for _ in range(2):
        assert all(np.array_equal(found[row], plain[row]) for row in range(48))
    assert np.flatnonzero(states != READY).tolist() == [6], "decoded each time, by whoever needs it"
    assert found.cache.bytes == 48 * 3 * 32 * 32 + sum(map(cache.entry_bytes, found._shelf.images.values()))

    del found, states
    assert first(run, killed=True).wait() == -signal.SIGKILL
    assert len(folders(memory)) == 2
    Loader(tiny_run("data.cache=encoded"), selection.sets(run.data, 0), 4, 32)
    assert folders(memory) == [], "the next run cleans up"


def test_other_content_size_or_orientation_is_another_file(tiny_run, memory):
    def opened(content: str = "a", orientation: str = "exif", size: int | None = 32) -> pixels.Pixels:
        return pixels.shared(content, orientation, size, 4, 1 << 20)

    one = [opened(), opened(content="b"), opened(orientation="ignore"), opened(size=None), opened(size=31)]
    assert len({id(p) for p in one}) == 5 == len(folders(memory)) // 2 and opened() is one[0]
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    assert one[0].write(2, noise, one[0].claim(2, noise.nbytes, 1 << 20)) and np.array_equal(one[0].get(2), noise)
    assert one[0].claim(2, 1, 1 << 20) is None and one[0].claim(3, 1, noise.nbytes) is None
    assert one[0].get(3) is None and one[1].get(2) is None and not one[0].get(2).flags.writeable


def test_a_full_disk_is_told_once_and_costs_only_the_cache(tiny_run, memory, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(os, "pwrite", full)
    run, plain = (tiny_run("data.forget=null", f"data.cache={kept}") for kept in ("decoded", "none"))
    made, expected = (Loader(r, selection.sets(r.data, 0), 4, 32) for r in (run, plain))
    assert all(torch.equal(made.batch(n).images, expected.batch(n).images) for n in range(4))
    assert caplog.text.count("decoded images are no longer kept: No space left") == 1


def test_what_no_trial_wants_goes_where_room_is_short_and_the_limit_is_of_the_machine(tiny_run, memory, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    run = tiny_run("data.forget=null", "data.cache=decoded", "data.cache_bytes=400KB")
    assert cache.limit(run.data, 4) == 100 << 10 and cache.image_cache(run.data, 4).limit == 400 << 10
    rows, kept = selection.sets(run.data, 0)["retain"], cache.image_cache(run.data, 4, 0.75)
    found = Images(rows, run.data, kept, 32)
    for row in range(48):
        assert found[row].shape == (32, 32, 3)
    key = Images.shelf(rows, run.data, 32)
    assert kept.decoded == 48 * 3072 and kept.row_groups._limit == (kept.limit - kept.decoded) // 4
    kept.make_room({key: np.arange(24)})
    assert kept.decoded == 48 * 3072, "half of them are wanted"
    kept.make_room({key: np.arange(23)})
    assert kept.decoded == 0 and folders(memory) == [] and np.array_equal(found[3], Images(rows, run.data, kept, 32)[3])
