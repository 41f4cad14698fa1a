"""Shards and their manifest, on a folder and on S3: every damage is told with the file's name."""

import dataclasses
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import CLASSES, encode, tiny_table
from support.manifests import OLDER, made_older

from unlearn import config
from unlearn.data import held_out, selection, shards
from unlearn.data.manifest import Manifest
from unlearn.data.row_groups import RowGroups
from unlearn.data.storage import Storage
from unlearn.errors import DataError, StorageError

PNG = encode(np.full((9, 7, 3), 50, np.uint8))


def put(storage: Storage, table: pa.Table, name: str = "a.parquet", **options) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    storage.write(name, sink.getvalue().to_pybytes())


def with_rows(manifest: Manifest, rows: int) -> RowGroups:
    """The first row group of a manifest, with so many rows."""
    return RowGroups.of([replace(manifest.shards[0].row_groups[0], rows=rows)])


def labelled(labels, images=None, **columns) -> pa.Table:
    return pa.table({"image": images or [{"bytes": PNG, "path": "p"}] * len(labels), "label": labels, **columns})


def test_index_tells_every_row_group_of_every_shard(copied, tiny_shards):
    assert shards.index(copied.uri).classes == CLASSES  # of the manifest that stood there
    copied.delete(shards.MANIFEST)
    manifest = shards.index(copied.uri)
    assert [s.path for s in manifest.shards] == [f"shard-{i}.parquet" for i in range(3)]
    assert manifest.columns == ["image", "label", "id", "subject"] and manifest.rows == 48
    assert manifest.starts.tolist() == list(range(0, 49, 8)) and len(manifest.groups) == 6
    for shard in manifest.shards:
        data = copied.read(shard.path)
        assert shard.bytes == len(data) and shard.sha256 == hashlib.sha256(data).hexdigest()
        for group in shard.row_groups:
            assert group.sha256 == hashlib.sha256(data[group.offset : group.offset + group.bytes]).hexdigest()
    assert [g.labels for s in manifest.shards for g in s.row_groups] == [(0, 0), (0, 1), (1, 1), (2, 2), (2, 3), (3, 3)]
    assert manifest == shards.load(copied.uri)
    named = dataclasses.replace(manifest, classes=CLASSES)
    shards.save(named)
    assert shards.load(copied.uri).hash == named.hash == shards.load(tiny_shards).hash != manifest.hash


def test_tables_and_images_are_those_of_the_rows(copied):
    manifest, whole = shards.load(copied.uri), pa.concat_tables([tiny_table(16 * i, 16) for i in range(3)])
    table = manifest.table(["id", "label"], [5, 1])
    assert table["row"].to_pylist() == [*range(40, 48), *range(8, 16)]
    assert table["id"].to_pylist() == [f"img-{r:03d}" for r in table["row"].to_pylist()]
    to_and_fro = manifest.table(["id"], [4, 0, 5, 0])
    assert to_and_fro["row"].to_pylist() == [*range(32, 40), *range(8), *range(40, 48), *range(8)]
    assert to_and_fro["id"].to_pylist() == [f"img-{r:03d}" for r in to_and_fro["row"].to_pylist()]
    assert manifest.table(["label"], []).num_rows == 0 and manifest.table(["label"]).num_rows == 48
    assert manifest.group_of(np.array([0, 7, 8, 47])).tolist() == [0, 0, 1, 5]
    found = list(shards.images(manifest.read(3, ["image"])))
    assert [bytes(v) for v in found] == [v["bytes"] for v in whole["image"].to_pylist()[24:32]]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})], ids=str
)
def test_image_layouts_and_null_images(tmp_path, kind):
    struct = pa.types.is_struct(kind)
    values = [{"bytes": PNG, "path": None} if struct else PNG, None, {"bytes": None, "path": "x"} if struct else None]
    put(Storage(tmp_path), labelled([0, 1, 2], pa.array(values, kind)))
    manifest = shards.index(str(tmp_path))
    assert [bytes(v) for v in shards.images(manifest.read(0, ["image"]))] == [PNG, b"", b""]
    assert manifest.columns == ["image", "label"] and manifest.classes == []


def test_images_are_views_of_the_table_and_of_a_part_of_it():
    """No copy: the images of a row group are in memory once."""
    whole = pa.table({"image": [b"0", None, b"22", b"", b"4444"]})
    bare = whole["image"].chunk(0).buffers()
    over_a_null = pa.Array.from_buffers(pa.binary(), 2, [pa.py_buffer(b"\x02"), *bare[1:]])  # row 0 null, yet of a byte
    assert [bytes(v) for v in shards.images(pa.table({"image": over_a_null}))] == [b"", b""]
    assert [bytes(v) for v in shards.images(whole.slice(1, 2))] == [b"", b"22"]
    assert [bytes(v) for v in shards.images(pa.concat_tables([whole.slice(4), whole.slice(0, 0), whole]))][:3] == [
        b"4444", b"0", b"",
    ]  # fmt: skip
    last = np.frombuffer(list(shards.images(whole))[4], np.uint8)
    assert np.shares_memory(last, np.frombuffer(bare[2], np.uint8))


def test_class_names_of_hugging_face_are_found(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    put(Storage(tmp_path), labelled([0, 1]).replace_schema_metadata(about))
    assert shards.index(str(tmp_path)).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "about", ["[1]", "{", '{"info": {"features": {"label": [1]}}}', '{"info": {"features": {"label": {}}}}']
)
def test_other_metadata_gives_no_names(tmp_path, about):
    put(Storage(tmp_path), labelled([0, 1]).replace_schema_metadata({"huggingface": about}))
    assert shards.index(str(tmp_path)).classes == []


def test_only_columns_that_every_shard_has_are_promised(tmp_path, caplog):
    put(Storage(tmp_path), labelled([0], id=["x"], subject=["s"]), "a.parquet")
    put(Storage(tmp_path), labelled([0], subject=["s"]), "b.parquet")
    put(Storage(tmp_path), labelled([0], id=["y"], subject=["s"]), "c.parquet")
    assert shards.index(str(tmp_path)).columns == ["image", "label", "subject"]
    assert "b.parquet: has no id, and files beside it have: no row of the folder will be found by it" in caplog.text


@pytest.mark.parametrize(
    "table, message",
    [
        (pa.table({"label": [1]}), "needs a column `image`"),
        (labelled([1], images=["text"]), "needs a column `image`"),
        (labelled(pa.array([1, None], pa.int64())), r"1 row\(s\) have no label"),
    ],
)
def test_a_shard_without_what_is_needed_is_told(tmp_path, table, message):
    put(Storage(tmp_path), table)
    with pytest.raises(DataError, match=f"a.parquet.*: {message}"):
        shards.index(str(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: b"not parquet" * 100, lambda d: b"", lambda d: d[:-4]]
)
def test_a_damaged_shard_is_told_by_name(copied, damage):
    manifest = shards.load(copied.uri)
    copied.write("shard-1.parquet", damage(copied.read("shard-1.parquet")))
    for call in (lambda: shards.index(copied.uri), lambda: manifest.read(2, ["image"])):
        with pytest.raises((DataError, StorageError), match="shard-1.parquet") as e:
            call()
        assert e.type is DataError
    assert manifest.read(0, ["label"]).num_rows == 8


def test_damaged_pages_behind_a_whole_footer_are_told(copied):
    manifest = shards.load(copied.uri)
    data, group = bytearray(copied.read("shard-1.parquet")), manifest.shards[1].row_groups[1]
    data[group.offset : group.offset + group.bytes] = b"\xff" * group.bytes
    copied.write("shard-1.parquet", bytes(data))
    for read in (lambda: manifest.read(3, ["image"]), lambda: replace(manifest, values="").table(["label"])):
        with pytest.raises(DataError, match="shard-1.parquet, row group 1: unreadable"):
            read()
    with pytest.raises(DataError, match="shard-1.parquet"):
        shards.index(copied.uri)


def test_a_shard_that_is_not_the_manifests_is_told(copied):
    manifest = shards.load(copied.uri)
    put(copied, tiny_table(0, 16), "shard-2.parquet", row_group_size=4)
    with pytest.raises(DataError, match="shard-2.parquet: not the file of the manifest"):
        manifest.read(4, ["label"])
    copied.delete("shard-2.parquet")
    with pytest.raises(StorageError, match="shard-2.parquet: there is no such"):
        manifest.read(4, ["label"])


@pytest.mark.parametrize(
    "damage",
    [lambda t: t[: len(t) // 2], lambda t: "", lambda t: t.replace('"rows": 8', '"rows": 9', 1),
     lambda t: t.replace("shard-1.parquet", "shard-0.parquet"), lambda t: t.replace('"offset"', '"ofset"'),
     lambda t: t.replace('"bee"', "[" * 9999),
     lambda t: t.replace("shard-1.parquet", "../1.parquet"), lambda t: t.replace("shard-1.parquet", "/1.parquet"),
     lambda t: t.replace('"bee"', "[" * 50 + "]" * 50), lambda t: t.replace('"rows": 8', f'"rows": {"9" * 5000}', 1)],
)  # fmt: skip
def test_a_damaged_manifest_of_an_earlier_version_is_told(copied, damage):
    made_older(copied.uri)
    copied.write(OLDER, damage(copied.read(OLDER).decode()).encode(errors="surrogateescape"))
    with pytest.raises(DataError, match="manifest.json is damaged .*make it anew with `unlearn shards index"):
        shards.load(copied.uri)
    assert shards.index(copied.uri) == shards.load(copied.uri) and OLDER not in copied.files()


@pytest.mark.parametrize(
    "change, why",
    [(lambda m: {"shards": [replace(m.shards[0], path="../../x.parquet")]}, "leads out of the folder"),
        (lambda m: {"shards": [replace(m.shards[0], path="/x")]}, "leads out"),
     (lambda m: {"shards": [replace(m.shards[0], row_groups=with_rows(m, 1 << 60))]},
         "cannot be"),
     (lambda m: {"shards": [replace(m.shards[0], bytes=-1)]}, "sizes are 0 or more"),
     (lambda m: {"classes": [["a"]]}, "valid string")],
)  # fmt: skip
def test_a_manifest_made_by_a_stranger_is_told(copied, change, why):
    """Its hash is right, and what it says is not."""
    shards.save(replace(shards.load(copied.uri), **change(shards.load(copied.uri))))
    with pytest.raises(DataError, match=f"manifest.row_groups is damaged .*{why}"):
        shards.load(copied.uri)


@pytest.mark.parametrize("text", ["[]", "{}", '{"mine": 1}', "[1", "\udcff", '{"shards": [], "version": 2}'])
def test_a_manifest_of_another_program_is_kept(copied, text):
    data = text.encode(errors="surrogateescape")
    copied.delete(shards.MANIFEST)
    copied.write(OLDER, data)
    with pytest.raises(DataError, match="manifest.json is not of this program; make one by `unlearn shards index"):
        shards.load(copied.uri)
    assert shards.find(copied.uri).hash == shards.index(copied.uri).hash == shards.load(copied.uri).hash
    assert copied.read(OLDER) == data


@pytest.mark.parametrize("data", [b"", bytes(4096), b"[]"], ids=["empty", "zeros", "another document"])
def test_whatever_a_damaged_manifest_holds_it_is_told_and_made_anew(copied, data):
    """As after a loss of power: a folder with such a file is not one without a manifest."""
    copied.write(shards.MANIFEST, data)
    for read in (shards.load, shards.find):
        with pytest.raises(DataError, match="manifest.row_groups is damaged .*`unlearn shards index"):
            read(copied.uri)
    assert shards.index(copied.uri).hash == shards.load(copied.uri).hash


def test_a_shard_replaced_by_one_of_the_same_shape_is_told_by_row_group(copied):
    def write(numbers, labels) -> None:
        table = labelled(
            labels, [{"bytes": encode(np.full((9, 7, 3), 10 * n, np.uint8), "BMP"), "path": None} for n in numbers]
        )
        put(copied, table, "shard-9.parquet", row_group_size=2, compression="none", use_dictionary=False)

    write([1, 2, 3, 4], [0, 1, 0, 1])
    copied.delete(shards.MANIFEST)
    for i in range(3):
        copied.delete(f"shard-{i}.parquet")
    manifest = replace(shards.index(copied.uri), values="")
    write([1, 2, 4, 3], [0, 1, 0, 1])
    assert manifest.read(0, ["image", "label"]).num_rows == 2 and manifest.table(["label"]).num_rows == 4
    with pytest.raises(DataError, match="shard-9.parquet, row group 1: the images are not those of the manifest"):
        manifest.read(1, ["image"])
    write([1, 2, 3, 4], [0, 1, 1, 0])
    with pytest.raises(DataError, match="shard-9.parquet, row group 1: the labels are not those of the manifest"):
        manifest.table(["label"])


def test_a_manifest_without_checks_still_holds(copied):
    whole = shards.load(copied.uri)
    made_older(copied.uri)
    tree = json.loads(copied.read(OLDER))
    del tree["images"]
    for group in (g for s in tree["shards"] for g in s["row_groups"]):
        del group["checks"]
    copied.write(OLDER, json.dumps(tree).encode())
    copied.delete("manifest.images")
    older = shards.load(copied.uri)
    assert older.hash == whole.hash == tree["hash"] and older.read(3, ["image"]).equals(whole.read(3, ["image"]))
    if copied.is_local():
        path, group = Path(copied.uri) / "shard-1.parquet", whole.shards[1].row_groups[1]
        data = bytearray(path.read_bytes())
        place = data.index(b"\xff\xd8", group.offset) + 1000  # within a JPEG
        data[place] ^= 1
        path.write_bytes(data)
        for manifest, what in (
            (older, "not the bytes of the manifest"),
            (whole, "the images are not those of the manifest"),
        ):
            with pytest.raises(DataError, match=f"shard-1.parquet, row group 1: {what}"):
                manifest.read(3, ["image"])
        data[place] ^= 1
        path.write_bytes(data)
    assert shards.index(copied.uri) == whole


def test_what_stands_in_hidden_and_temporary_folders_is_no_shard(place):
    storage, table = Storage(place), labelled([0, 1])
    for name in (
        "part-0.snappy.parquet",
        "_temporary/0/part-0.snappy.parquet",
        "_delta_log/1.checkpoint.parquet",
        ".cache/x.parquet",
        "a/.b.parquet",
        "_x.pq",
    ):
        put(storage, table, name)
    storage.write("_SUCCESS", b"")
    assert [s.path for s in shards.index(place).shards] == ["part-0.snappy.parquet"]


HUB = [
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet",
    "data/test-00000-of-00001-0123456789abcdef.parquet",
]


@pytest.mark.parametrize("names",
    [HUB, ["train/0.parquet", "train/1.parquet", "test/0.parquet"],
        ["split=train/a/0.parquet", "split=train/1.parquet", "split=test/0.parquet"],
                                   ["train_0.parquet", "train.parquet", "test.parquet"]], ids=str)  # fmt: skip
def test_splits_of_one_folder_are_never_one_set(place, names):
    for i, name in enumerate(names):
        put(Storage(place), labelled([i] * 2), name)
    with pytest.raises(DataError, match="holds several splits: test, train; choose one with --split"):
        shards.index(place)
    with pytest.raises(DataError, match="no files of a split val; there are test, train"):
        shards.index(place, split="val")
    train = shards.index(place, split="train")
    assert train.rows == 4 and shards.load(place) == shards.load(place, "train") == shards.find(place) == train
    test = shards.index(place, split="test")
    assert (
        test.table(["label"])["label"].to_pylist() == [2, 2]
        and shards.load(place, "test") == test
        and shards.load(place, "train") == train
    )
    with pytest.raises(DataError, match="holds several splits: test, train; say which with `split`"):
        shards.load(place)
    settings = config.Data(train=place, split="train", proxy={}, proxy_split="test", forget={"classes": [0]})
    found = selection.sets(settings, 0)
    assert found["forget"].manifest == train and found["retain"].manifest == test
    tree = {
        "run_dir": "x",
        "data": {"train": place, "split": "train", "retain": {}},
        "training": {"steps": 1, "batch_size": 4},
    }
    run = config.parse(tree | {"evaluation": {"split": "test"}})
    assert held_out.sets(run, selection.sets(run.data, 0))["retain"].manifest == test


def test_versions_of_one_set_on_a_hub_are_told(tmp_path, caplog):
    """Each subset, and what the hub converts by itself, has a folder with the same numbered files."""
    for name in ("en/train-00000-of-00001.parquet", "fr/train-00000-of-00001.parquet", "en/partial-test/0000.parquet"):
        put(Storage(str(tmp_path)), labelled([0]), name)
    assert shards.index(str(tmp_path), split="train").rows == 2
    assert "en, fr hold files of the same names, and are taken as one set" in caplog.text
    assert shards.index(str(tmp_path), split="test").rows == 1


def test_a_folder_of_one_split_is_a_set(tmp_path):
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"):
        put(Storage(tmp_path), labelled([0, 1]), name)
    assert shards.index(str(tmp_path)).rows == shards.load(str(tmp_path)).rows == 4


def test_a_file_name_that_is_not_utf8_is_told(tmp_path):
    put(Storage(tmp_path), labelled([0]))
    os.rename(tmp_path / "a.parquet", os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    with pytest.raises(DataError, match=r"the name of a file is not UTF-8: caf\?.parquet"):
        shards.index(str(tmp_path))


def test_a_folder_name_that_is_not_utf8_is_told(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    pq.write_table(tiny_table(0, 4), tmp_path / "a.parquet")
    os.rename(tmp_path / "a.parquet", folder + b"/a.parquet")
    with pytest.raises(StorageError, match="this path is not UTF-8: rename the folder"):
        shards.index(os.fsdecode(folder))


def test_a_folder_without_manifest_or_shards_is_told(place):
    Storage(place).write("readme", b"1")
    with pytest.raises(DataError, match="no manifest.row_groups there.*unlearn shards index"):
        shards.load(place)
    with pytest.raises(DataError, match="no .parquet file there"):
        shards.index(place)


def test_the_embedded_shards_are_what_their_manifest_says():
    for name, rows in (("fashion-train", 5000), ("fashion-test", 1000)):
        manifest = shards.load(f"embedded:{name}")
        assert manifest.rows == rows and len(manifest.classes) == 10
        assert sorted(np.unique(manifest.table(["label"])["label"].to_numpy()).tolist()) == list(range(10))
        for shard in manifest.shards:
            assert hashlib.sha256(Path(manifest.uri, shard.path).read_bytes()).hexdigest() == shard.sha256
