"""Packing by many workers: the same shards for any number of them, scaled as training scales, and gone on with behind a
kill."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from support.images import encode

from jobs import pack as job
from jobs import submit
from jobs.backends import base
from unlearn.data import node_cache, pack_file, scaling, shards, tars
from unlearn.data.decode import decode
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, DataError, UnlearnError


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A tar of 20 JPEGs of two classes, 90 x 60 or 60 x 90 pixels; the classes take turns."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("tar") / "photographs.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(20):
            shape = (60, 90, 3) if number % 4 < 2 else (90, 60, 3)
            data = encode(rng.integers(0, 256, shape, np.uint8), "JPEG")
            member = tarfile.TarInfo(f"{('bee', 'ant')[number % 2]}/{number:02d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def packing(photographs: Path | str, dest: Path, **keys) -> pack_file.Packing:
    tree = {"source": str(photographs), "dest": str(dest), "rows_per_shard": 4, "rows_per_group": 3, **keys}
    return pack_file.read(yaml.safe_dump(tree), "pack.yaml")


def content(dest: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(dest.glob("*.parquet"))}


def rows(dest: Path) -> list[dict]:
    return [row for path in sorted(dest.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_tars_below_a_prefix_of_s3_are_refused(photographs, s3, tmp_path):
    """A worker would look for an object of a member's name."""
    Storage(s3).write("in/train.tar", photographs.read_bytes())
    with pytest.raises(
        DataError, match=f"{s3}/in: images in tars below a prefix .*unlearn shards build.*copy the tars"
    ):
        job.pack(packing(f"{s3}/in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_images_are_scaled_as_for_training_and_shuffled_by_the_seed(photographs, tmp_path):
    manifest = job.pack(packing(photographs, tmp_path / "class", size=32, lossless="png"))
    assert manifest.rows == 20 and manifest.classes == ["ant", "bee"] and len(manifest.shards) == 5
    made = rows(tmp_path / "class")
    assert [row["label"] for row in made] == [0] * 10 + [1] * 10
    with tarfile.open(photographs) as tar:
        for row in made:
            image = decode(tar.extractfile(row["id"]).read())
            found = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            assert min(found.shape[:2]) == 32 and max(found.shape) == 48
            assert np.array_equal(found, scaling.scaled(image, *found.shape[:2]))
            assert np.array_equal(scaling.fit(found, 32), scaling.fit(image, 32)), "what a model of 32 pixels sees"

    shuffled = [packing(photographs, tmp_path / f"{seed}", order="shuffled", seed=seed) for seed in (1, 2)]
    for each in shuffled:
        job.pack(each)
    orders = [[row["id"] for row in rows(tmp_path / f"{seed}")] for seed in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    with tarfile.open(photographs) as tar:
        assert all(row["image"]["bytes"] == tar.extractfile(row["id"]).read() for row in rows(tmp_path / "1"))

    job.pack(packing(photographs, tmp_path / "jpeg", size=32, quality=80))
    job.pack(packing(photographs, tmp_path / "webp", lossless="webp"))
    assert {Image.open(io.BytesIO(row["image"]["bytes"])).format for row in rows(tmp_path / "jpeg")} == {"JPEG"}
    webp = rows(tmp_path / "webp")[0]
    with tarfile.open(photographs) as tar:
        assert np.array_equal(decode(webp["image"]["bytes"]), decode(tar.extractfile(webp["id"]).read()))


def test_it_goes_on_with_what_is_missing_and_refuses_shards_of_another_packing(photographs, tmp_path, monkeypatch):
    found = packing(photographs, tmp_path / "shards", size=32)
    job.pack(found)
    before = content(tmp_path / "shards")
    Storage(found.dest).delete("shard-00003.parquet")
    Storage(found.dest).delete(shards.MANIFEST)
    write, written, told = job.packing.write_shard, [], []
    monkeypatch.setattr(
        job.packing, "write_shard", lambda r, s, name, *more: written.append(name) or write(r, s, name, *more)
    )
    job.pack(found, lambda *now: told.append(now))
    assert written == ["shard-00003.parquet"] and told == [(4, 5), (5, 5)] and content(tmp_path / "shards") == before
    assert job.pack(found).rows == 20 and len(written) == 1

    with pytest.raises(DataError, match="packed in another way"):
        job.pack(found.model_copy(update={"size": 31}))
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as tar, tarfile.open(photographs) as whole:
        for member in whole.getmembers()[1:]:
            tar.addfile(member, whole.extractfile(member))
    (tmp_path / "about").mkdir()
    Storage(tmp_path / "about").write(job.ABOUT, json.dumps({"packing": found.identity(), "images": "0"}).encode())
    with pytest.raises(DataError, match="packed from other images"):
        job.pack(packing(photographs, tmp_path / "about", size=32))
    Storage(tmp_path / "about").write(job.ABOUT, b'["cut off')
    with pytest.raises(DataError, match="_pack.json is damaged"):
        job.pack(packing(photographs, tmp_path / "about", size=32))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "0.parquet").write_bytes(next(iter(before.values())))
    with pytest.raises(DataError, match="holds shards already"):
        job.pack(packing(photographs, tmp_path / "full"))
    for keys, why in (
        ({"quality": 9, "lossless": "png"}, "give one of them"),
        ({"leave_out_damaged": True}, "not decoded here"),
    ):
        with pytest.raises(ConfigError, match=why):
            packing(photographs, tmp_path, **keys)


def test_a_compressed_tar_is_unpacked_once_and_packed_as_a_plain_one(photographs, tmp_path, monkeypatch):
    source = tmp_path / "photographs.tar.gz"
    source.write_bytes(gzip.compress(photographs.read_bytes()))
    unpacking, unpacked = tars.unpacking, []
    monkeypatch.setattr(tars, "unpacking", lambda path: unpacked.append(path) or unpacking(path))
    found = packing(source, tmp_path / "shards", size=32)
    job.pack(found)
    job.pack(packing(photographs, tmp_path / "plain", size=32))
    assert unpacked == [source] and content(tmp_path / "shards") == content(tmp_path / "plain")
    another, piece = job.ShardPacker(found, ["ant", "bee"]), {"names": ["ant/01.jpg"], "labels": [0]}
    assert another({"shard": "more.parquet", **piece})["error"] == "" and unpacked == [source]
    node_cache.release(Path(job._near(found.source)))
    assert not list(node_cache.private("unpacked").iterdir()), "the last process deletes it"

    source.write_bytes(source.read_bytes()[:-300])
    with pytest.raises(DataError, match="photographs.tar.gz: not a tar file, or cut short"):
        job.pack(packing(source, tmp_path / "damaged"))


def test_damaged_images_end_it_or_are_left_out_and_counted(photographs, tmp_path, caplog):
    folder = tmp_path / "folder"
    with tarfile.open(photographs) as tar:
        tar.extractall(folder, filter="data")
    (folder / "ant" / "05.jpg").write_bytes(b"no image")
    with pytest.raises(UnlearnError, match=r"ant/05.jpg does not decode .*set leave_out_damaged"):
        job.pack(packing(folder, tmp_path / "a", size=32))
    assert job.pack(packing(folder, tmp_path / "b", size=32, leave_out_damaged=True)).rows == 19
    assert "left out: 1 damaged image(s)" in caplog.text


def test_a_packing_is_sent_as_any_job(photographs, tmp_path):
    found = packing(photographs, tmp_path / "shards", size=32, cluster={"address": "10.0.0.1:6379", "workers": 3})
    sent = submit.request(found, "pack", elsewhere=True)
    assert sent.command[:3] == ["-m", "unlearn", "pack"] and sent.run_dir == found.dest and sent.id.startswith("pack-")
    assert base.settings(sent) == found.elsewhere() and base.settings(sent).cluster.workers == 3
    assert set(found.locations()) == {"source", "dest"}


@pytest.mark.slow
def test_two_workers_that_are_killed_and_go_on_make_the_shards_of_one(photographs, tmp_path):
    keys = {"size": 32, "order": "shuffled", "rows_per_shard": 1}
    job.pack(packing(photographs, tmp_path / "one", **keys))
    two = packing(photographs, tmp_path / "two", cluster={"workers": 2, "cpus_per_worker": 0.5}, **keys)
    (tmp_path / "pack.yaml").write_text(pack_file.dump(two))
    process = subprocess.Popen(
        [sys.executable, "-m", "unlearn", "pack", str(tmp_path / "pack.yaml")],
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 300
    while not content(tmp_path / "two") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    there = content(tmp_path / "two")
    assert 0 < len(there) < 20 and not (tmp_path / "two" / shards.MANIFEST).exists()
    stamps = {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in there}
    assert job.pack(two).rows == 20
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in there} == stamps
    assert shards.load(two.dest).hash == shards.load(str(tmp_path / "one")).hash
