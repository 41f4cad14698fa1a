"""The manifest as a Parquet file, beside what earlier versions wrote, and what is made of files from outside."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import tiny_table
from support.manifests import OLDER, as_json, made_older

from unlearn.data import checking, manifest_file, shards
from unlearn.data.row_groups import RowGroup, RowGroups
from unlearn.data.storage import Storage
from unlearn.errors import DataError


def parts(storage: Storage) -> tuple[pa.Table, dict]:
    """(row groups, what is said of the folder) of a manifest, as any reader of Parquet sees them."""
    with pq.ParquetFile(pa.BufferReader(storage.read(shards.MANIFEST))) as file:
        return file.read(), json.loads(file.metadata.metadata[b"manifest"])


def put(storage: Storage, table: pa.Table, tree: object, **options) -> None:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, **options) as file:
        file.write_table(table)
        file.add_key_value_metadata({"manifest": json.dumps(tree)})
    storage.write(shards.MANIFEST, sink.getvalue().to_pybytes())


def test_any_reader_of_parquet_sees_a_row_for_each_row_group(copied):
    manifest = shards.load(copied.uri)
    table, tree = parts(copied)
    assert table["shard"].to_pylist() == [0, 0, 1, 1, 2, 2] and table["rows"].to_pylist() == [8] * 6
    assert table["min_label"].to_pylist() == [0, 0, 1, 2, 2, 3] and table["max_label"].to_pylist() == [0, 1, 1, 2, 3, 3]
    second = manifest.shards[1].row_groups[0]
    assert table["sha256"][2].as_py().hex() == second.sha256 and table["offset"][2].as_py() == second.offset
    assert table["check_id"][2].as_py().hex() == second.checks["id"]
    assert [shard["path"] for shard in tree["shards"]] == [shard.path for shard in manifest.shards]
    assert tree["hash"] == manifest.hash and tree["classes"] == manifest.classes
    put(copied, table, tree)  # however its pages are written
    assert shards.load(copied.uri) == manifest


def test_an_older_manifest_is_the_same_as_the_new_one_and_gives_way_to_it(copied):
    manifest = made_older(copied.uri)
    older = shards.load(copied.uri)
    assert older == manifest and older.hash == manifest.hash and shards.is_indexed(copied.uri)
    assert checking.inspect(copied.uri)["hash"] == manifest.hash
    assert shards.index(copied.uri) == manifest == shards.load(copied.uri)
    assert OLDER not in copied.files() and shards.is_indexed(copied.uri)
    # One that comes back, as from a backup, is of no account; nor is it read where the new one is damaged.
    copied.write(OLDER, as_json(dataclasses.replace(manifest, classes=["a", "b", "c", "d"])))
    assert shards.load(copied.uri) == manifest
    copied.write(shards.MANIFEST, copied.read(shards.MANIFEST)[:-9])
    with pytest.raises(DataError, match="manifest.row_groups is damaged"):
        shards.load(copied.uri)


def test_the_hash_is_that_of_earlier_versions():
    """Of a folder that one of them indexed: hashes of configurations and releases depend on it."""
    assert shards.load("embedded:fashion-train").hash.startswith("fadb3f5c9e5b9cea")
    tree = json.loads(Storage("embedded:fashion-train").read(OLDER))
    assert shards.load("embedded:fashion-train").hash == tree["hash"]


def test_an_index_that_fails_leaves_the_older_manifest(tmp_path, tiny_shards, monkeypatch):
    storage = Storage(str(tmp_path))
    for name in Storage(tiny_shards).files():
        storage.write(name, Storage(tiny_shards).read(name))
    manifest = made_older(storage.uri)

    def full(manifest) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr(manifest_file, "_parquet", full)
    with pytest.raises(OSError, match="no space left"):
        shards.index(storage.uri)
    assert OLDER in storage.files() and shards.MANIFEST not in storage.files() and shards.load(storage.uri) == manifest


def test_splits_of_both_kinds_stand_beside_each_other(tmp_path):
    for split in ("train", "test"):
        pq.write_table(tiny_table(0 if split == "train" else 16, 16), tmp_path / f"{split}.parquet", row_group_size=8)
    train, test = (shards.index(str(tmp_path), split=split) for split in ("train", "test"))
    (tmp_path / "manifest-train.json").write_bytes(as_json(train))
    (tmp_path / "manifest-train.row_groups").unlink()
    assert shards.load(str(tmp_path), "train") == train and shards.load(str(tmp_path), "test") == test
    with pytest.raises(DataError, match="holds several splits: test, train; say which"):
        shards.load(str(tmp_path))
    (tmp_path / "manifest-test.rows").unlink()
    with pytest.raises(DataError, match="unlearn shards index .* --split test"):
        test.table(["label"])
    (tmp_path / "manifest-test.row_groups").unlink()
    assert shards.load(str(tmp_path)) == train and shards.is_indexed(str(tmp_path), "train")
    assert not shards.is_indexed(str(tmp_path), "test")
    with pytest.raises(DataError, match="no manifest-test.row_groups there.*unlearn shards index .* --split test"):
        shards.load(str(tmp_path), "test")
    assert shards.index(str(tmp_path), split="train") == train and not (tmp_path / "manifest-train.json").exists()


def test_files_from_outside_are_refused_before_they_take_memory(tmp_path, tiny_shards):
    storage = Storage(str(tmp_path))
    manifest = shards.load(tiny_shards)
    storage.write(shards.MANIFEST, Storage(tiny_shards).read(shards.MANIFEST))
    table, tree = parts(storage)
    text = pa.array(["x" * 1000] * 6)

    def change(name: str, column: pa.Array) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, column)

    huge = pa.Table.from_arrays([pa.chunked_array([c.take([0] * 10**5)]) for c in table.columns], table.column_names)
    bad = [
        (huge, tree, "more row groups than it has room for"),  # 100,000 of them in a few kB
        (change("rows", text), tree, "its columns are of other types"),
        (table.drop_columns(["offset"]), tree, "offset"),
        (change("shard", pa.array([0, 0, 1, 1, 2, 3], pa.int32())), tree, "a row group of no shard"),
        (change("shard", pa.array([0, 0, 1, 2, 1, 2], pa.int32())), tree, "a row group of no shard"),
        (change("shard", pa.array([0, 0, 1, 1, 2, None], pa.int32())), tree, "a row group of no shard"),
        (change("rows", pa.array([8, 8, 8, 8, 8, None], pa.int64())), tree, "a row group without rows"),
        (change("rows", pa.array([8, 8, 8, 8, 8, 9], pa.int64())), tree, "its hash is not that of its content"),
        (table, {**tree, "classes": [["a"]]}, "valid string"), (table, {**tree, "shards": 3}, "int"), (table, [], ""),
        (table, {**tree, "shards": tree["shards"][:2]}, "a row group of no shard"),
    ]  # fmt: skip
    for content, about, why in bad:
        put(storage, content, about, compression="zstd")
        with pytest.raises(DataError, match=rf"manifest.row_groups is damaged \(.*{why}.*make it anew with"):
            shards.load(storage.uri)
    data = Storage(tiny_shards).read(shards.MANIFEST)
    at = data.index(bytes.fromhex(manifest.shards[0].row_groups[0].checks["image"]))
    for broken in (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:1000], data[:-5], data[4:], b""):
        storage.write(shards.MANIFEST, broken)
        with pytest.raises(DataError, match=r"manifest.row_groups is damaged \(.*make it anew with"):
            shards.load(storage.uri)


def test_row_groups_are_small_in_memory_and_when_they_are_sent(tiny_shards):
    group = shards.load(tiny_shards).shards[0].row_groups[1]
    many = RowGroups.of([dataclasses.replace(group, offset=number) for number in range(10_000)])
    manifest = dataclasses.replace(shards.load(tiny_shards), shards=[
        shards.Shard("a.parquet", 1, "", many[:4000]), shards.Shard("b.parquet", 1, "", many[4000:])
    ])  # fmt: skip
    assert manifest.facts.nbytes < 110 * 10_000 and len(pickle.dumps(manifest)) < 112 * 10_000
    assert manifest.row_group(4001) == dataclasses.replace(group, offset=4001) == many[4001] == list(many)[4001]
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    assert manifest.groups[[0, 3999, 4000]].tolist() == [[0, 0], [0, 3999], [1, 0]]
    assert manifest.shards_of([9999, 4000]) == [1] and np.array_equal(manifest.starts, np.arange(10_001) * group.rows)


@pytest.mark.parametrize("wrong", [{"sha256": "ab"}, {"checks": {"image": "00"}}, {"checks": {"other": "00" * 8}}])
def test_a_row_group_whose_checksums_are_none_is_refused(wrong):
    with pytest.raises(ValueError, match="checksums"):
        RowGroups.of([dataclasses.replace(RowGroup(1, 0, 1, (0, 0), "00" * 32), **wrong)])
