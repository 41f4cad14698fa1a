"""`unlearn shards index`: several files and row groups at a time, gone on with after a stop; and what inspect needs."""

import dataclasses
import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.images import tiny_table

from unlearn.data import checking, described, shards
from unlearn.data.storage import Storage


def copied(source: str, place: str) -> str:
    for name in ("shard-0.parquet", "shard-1.parquet", "shard-2.parquet"):
        Storage(place).write(name, Storage(source).read(name))
    return place


def beside(place: str) -> dict[str, bytes]:
    """What lies beside the shards."""
    storage = Storage(place)
    return {name: storage.read(name) for name in storage.files() if not name.endswith(".parquet")}


@pytest.fixture
def read(monkeypatch) -> list[tuple[str, int]]:
    """(file, row group) of every row group that is read, as it is begun."""
    known, seen = described._describe_group, []

    def describe(parquet, file, g, columns, name, where):
        seen.append((name, g))
        return known(parquet, file, g, columns, name, where)

    monkeypatch.setattr(described, "_describe_group", describe)
    return seen


def test_an_index_that_was_stopped_goes_on_with_the_files_it_has_not_read(place, tiny_shards, read, tmp_path):
    copied(tiny_shards, place)
    whole = copied(tiny_shards, str(tmp_path / "whole"))
    expected = shards.index(whole, threads=1)

    def stop(done: int, total: int) -> None:
        if len(read) == 3:  # the first row group of the second file
            raise KeyboardInterrupt

    read.clear()
    with pytest.raises(KeyboardInterrupt):
        shards.index(place, progress=stop, threads=1)
    assert not shards.is_indexed(place) and any(name.startswith("_index/") for name in beside(place))
    read.clear()
    seen = []
    found = shards.index(place, progress=lambda *of: seen.append(of), threads=1)
    names = {name for name, _ in read}  # the third may have been read to its end while the second was stopped
    assert "shard-1.parquet" in names and "shard-0.parquet" not in names
    assert found.hash == expected.hash and beside(place).keys() == beside(whole).keys()  # and no `_index`
    assert all(beside(place)[name] == content for name, content in beside(whole).items() if name != shards.MANIFEST)
    assert seen[-1][0] == seen[-1][1] and all(a <= b for (a, _), (b, _) in itertools.pairwise(seen))


def test_what_a_stopped_index_has_found_is_of_that_file_and_of_that_question(tiny_shards, read, tmp_path):
    place = copied(tiny_shards, str(tmp_path / "place"))
    shards.look(place, keep=True, threads=1)
    read.clear()
    assert len(shards.look(place, keep=True)[0].shards) == 3 and read == []
    shards.look(place, columns={"id": "none"}, keep=True, threads=1)
    assert len(read) == 6
    shards.look(place, keep=True)
    pq.write_table(tiny_table(0, 16), tmp_path / "place" / "shard-1.parquet", row_group_size=4)
    read.clear()
    assert [len(s.row_groups) for s in shards.look(place, keep=True)[0].shards] == [2, 4, 2]
    assert {name for name, _ in read} >= {"shard-1.parquet"}
    for entry in (tmp_path / "place" / "_index").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    assert shards.index(place).rows == 48 and not (tmp_path / "place" / "_index").exists()


@pytest.mark.parametrize("text", [False, True], ids=["labels", "names"])
def test_an_index_that_was_stopped_within_a_file_goes_on_with_its_row_groups(read, tmp_path, monkeypatch, text):
    monkeypatch.setattr(described, "TOGETHER", 4)
    monkeypatch.setattr(described, "PART", 0)
    (tmp_path / "place").mkdir()
    table = tiny_table(0, 48)
    if text:
        names = [f"class {label}" for label in table["label"].to_pylist()]
        table = table.set_column(table.column_names.index("label"), "label", [names])
    pq.write_table(table, tmp_path / "place" / "one.parquet", row_group_size=2)
    expected, rows = shards.look(str(tmp_path / "place"))

    def stop(done: int, total: int) -> None:
        if len(read) == 11:  # in the third part of six
            raise KeyboardInterrupt

    read.clear()
    with pytest.raises(KeyboardInterrupt):
        shards.index(str(tmp_path / "place"), progress=stop, threads=1)
    read.clear()
    found, same = shards.look(str(tmp_path / "place"), keep=True, threads=1)
    again = {group for _, group in read}  # the fourth part may have been read to its end while the third was stopped
    assert {*range(8, 12)} <= again and not again & {*range(8)}
    assert found == expected and np.array_equal(same.images, rows.images) and same.values.equals(rows.values)
    pq.write_table(table, tmp_path / "place" / "one.parquet", row_group_size=3)
    read.clear()
    assert len(shards.index(str(tmp_path / "place")).groups) == 16 and len(read) == 16
    assert not (tmp_path / "place" / "_index").exists()


def test_threads_change_nothing(tmp_path):
    """One file of many row groups is read by several threads, and so are several files."""
    (tmp_path / "a").mkdir()
    pq.write_table(tiny_table(0, 48), tmp_path / "a" / "one.parquet", row_group_size=1)
    found = [shards.index(str(tmp_path / "a"), threads=threads) for threads in (1, 3)]
    assert found[0] == found[1] and len(found[0].groups) == 48
    (tmp_path / "a" / "two.parquet").write_bytes((tmp_path / "a" / "one.parquet").read_bytes())
    found = [shards.index(str(tmp_path / "a"), threads=threads) for threads in (1, 2, 5)]
    assert found[0] == found[1] == found[2] and found[0].rows == 96


def test_images_without_anything_else_are_kept_too(tmp_path, read):
    pq.write_table(tiny_table(0, 16).select(["image"]), tmp_path / "a.parquet", row_group_size=8)
    first, rows = shards.look(str(tmp_path), keep=True)
    read.clear()
    again, same = shards.look(str(tmp_path), keep=True)
    assert first == again and np.array_equal(rows.images, same.images) and read == []


def test_inspect_reads_the_manifest_alone(s3, proxied, tiny_shards):
    copied(tiny_shards, s3)
    manifest = shards.index(s3)
    assert manifest.counts == {0: 12, 1: 12, 2: 12, 3: 12} == shards.load(s3).counts
    assert manifest.hash == dataclasses.replace(manifest, counts={}).hash
    proxied.requests.clear()
    about = checking.inspect(s3)
    assert about["images"] == 48 and about["classes"].startswith("4: ")
    assert {path.partition("?")[0].rpartition("/")[2] for _, path in proxied.requests} == {shards.MANIFEST}
    shards.save(dataclasses.replace(manifest, counts={}))
    assert checking.inspect(s3) == about
