"""Shards without some of their rows: what stays is as it was, what goes is nowhere."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import CLASSES, tiny_table

from unlearn.data import checking, removal, selection, shards
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage
from unlearn.errors import DataError


def rows(manifest, numbers) -> RowSet:
    return RowSet(manifest, np.array(numbers, np.int64), np.zeros(len(numbers), np.int64))


def test_what_stays_is_as_it_was_and_what_goes_is_nowhere(tiny_shards, place):
    before = shards.load(tiny_shards)
    gone = np.array([0, 3, *range(16, 32), 40])  # the second shard whole
    after = removal.without(before, gone, place)
    assert [shard.path for shard in after.shards] == ["shard-0.parquet", "shard-2.parquet"] and after.classes == CLASSES
    beside = ["manifest.images", "manifest.rows"]
    assert removal.touched(before, gone) == ["shard-0.parquet", "shard-1.parquet", "shard-2.parquet", *beside]
    keep = np.setdiff1d(np.arange(48), gone)
    old, new = before.table(["label", "id", "subject"]).take(keep), after.table(["label", "id", "subject"])
    assert old.drop(["row"]).equals(new.drop(["row"])) and checking.verify(place) == len(keep)
    images = pa.concat_tables([before.read(g, ["image"]) for g in range(6)]).take(keep)
    assert [bytes(i) for i in shards.images(images)] == [
        bytes(i) for g in range(len(after.groups)) for i in shards.images(after.read(g, ["image"]))
    ]
    storage, name = Storage(place), b"img-003"
    assert not any(name in storage.read(file) for file in storage.files()), "its id is in no page and in no statistics"
    assert removal.without(before, np.array([5]), place).hash == after.hash, "what was written is taken"
    storage.write("_index/x.arrow", b"left by an index that was stopped")
    assert removal.touched(after, np.array([0])) == ["shard-0.parquet", *beside, "_index/x.arrow"]


def test_a_shard_that_loses_nothing_keeps_its_bytes_and_half_a_folder_is_written_anew(tiny_shards, tmp_path):
    before = shards.load(tiny_shards)
    (tmp_path / "shard-9.parquet").write_bytes(b"left by a process that was killed")
    after = removal.without(before, np.array([17]), str(tmp_path))
    assert {s.path: s.sha256 for s in after.shards} | {"shard-1.parquet": ""} == {
        s.path: s.sha256 for s in before.shards
    } | {"shard-1.parquet": ""}
    assert not (tmp_path / "shard-9.parquet").exists() and after.hash != before.hash
    with pytest.raises(DataError, match="no row is left"):
        removal.without(before, np.arange(48), str(tmp_path / "none"))


def test_the_same_image_under_another_number_goes_too(tmp_path):
    table = tiny_table(0, 12)
    again = table.slice(3, 1).set_column(2, "id", pa.array(["other"]))
    pq.write_table(pa.concat_tables([table, again, table.slice(5, 1)]), tmp_path / "a.parquet", row_group_size=4)
    manifest = shards.save(dataclasses.replace(shards.index(str(tmp_path)), classes=CLASSES))
    assert removal.with_duplicates(rows(manifest, [3, 5])).tolist() == [3, 5, 12, 13]


def test_columns_of_the_users_own_and_their_names_stay(tmp_path):
    table = (
        tiny_table(0, 8)
        .rename_columns(["picture", "label", "id", "subject"])
        .append_column("note", pa.array(list("abcdefgh")))
    )
    (tmp_path / "old").mkdir()
    pq.write_table(table, tmp_path / "old" / "a.parquet", compression="zstd")
    manifest = shards.index(str(tmp_path / "old"), columns={"image": "picture"}, classes=CLASSES)
    after = removal.without(manifest, np.array([1, 2]), str(tmp_path / "new"))
    assert after.names == manifest.names and after.classes == CLASSES
    file = pq.ParquetFile(tmp_path / "new" / "a.parquet")
    assert (
        file.read(["note"])["note"].to_pylist() == list("adefgh")
        and file.metadata.row_group(0).column(0).compression == "ZSTD"
    )
    assert selection.name_row(after, 1) == "img-003" and Path(tmp_path, "old", "a.parquet").exists()
