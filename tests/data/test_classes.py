"""Classes by name: within a folder, between training and held-out data, and images that stand in two sets."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import encode

from unlearn import config
from unlearn.data import checking, classes, held_out, packing, selection, shards
from unlearn.errors import ConfigError, DataError


def image(number: int) -> bytes:
    return encode(np.full((6, 6, 3), number, np.uint8))


def put(path, labels, names=None, first: int = 0, name: str = "a.parquet", **columns) -> str:
    """A shard of images first, first + 1, ... with these labels, whose names are in its metadata."""
    path.mkdir(parents=True, exist_ok=True)
    about = (
        {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}
        if names
        else None
    )
    images = [{"bytes": image(first + i), "path": None} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels} | columns)
    pq.write_table(table.replace_schema_metadata(about), path / name)
    return str(path)


def indexed(*arguments, **options) -> str:
    where = put(*arguments, **options)
    shards.index(where)
    return where


def picked(where: str, **conditions) -> list[int]:
    return selection.select(shards.load(where), config.Rows(**conditions), 0, "forget").rows.tolist()


def measured(train: str, evaluation: str, **data) -> dict[str, list[int]]:
    """Row numbers of the held-out sets."""
    run = config.parse(
        {
            "run_dir": "x",
            "data": {"train": train, **data},
            "training": {"steps": 1, "batch_size": 4},
            "evaluation": {"data": evaluation},
        }
    )
    return {name: rows.rows.tolist() for name, rows in held_out.sets(run, selection.sets(run.data, 0)).items()}


def test_lists_of_files_are_joined_by_name(tmp_path):
    put(tmp_path, [0, 1, 1], ["a", "b"], name="x.parquet")
    put(tmp_path, [0, 1, 2], ["b", "a", "c"], name="y.parquet")
    put(tmp_path, [0], ["a"], name="z.parquet")
    pq.ParquetWriter(tmp_path / "0.parquet", pa.schema({"image": pa.binary(), "label": pa.int64()})).close()
    manifest, where = shards.index(str(tmp_path)), str(tmp_path)
    assert manifest.classes == ["a", "b", "c"] and manifest.table(["label"])["label"].to_pylist() == [
        0,
        1,
        1,
        1,
        0,
        2,
        0,
    ]
    assert [s.labels for s in manifest.shards] == [[], [], [1, 0, 2], []] and shards.load(where) == manifest
    assert picked(where, classes=["a"]) == [0, 4, 6] and picked(where, classes=["c"]) == [5]
    assert [g.labels for s in manifest.shards for g in s.row_groups] == [(0, 1), (0, 2), (0, 0)]


def test_lists_that_cannot_be_joined_are_told(tmp_path):
    put(tmp_path, [0, 1], ["a", "b"], name="x.parquet")
    put(tmp_path, [0, 1], name="y.parquet")
    with pytest.raises(DataError, match="y.parquet: its labels have no names, and files beside it name theirs"):
        shards.index(str(tmp_path))
    assert shards.index(str(tmp_path), classes=["c", "d"]).classes == ["c", "d"]
    with pytest.raises(DataError, match="label 1, and 1 class names are given: name them all"):
        shards.index(str(tmp_path), classes=["c"])
    put(tmp_path, [0, 1, 2], ["crane", "b", "crane"], name="y.parquet")
    with pytest.raises(
        DataError, match="y.parquet: two classes are called 'crane', and files beside it have other class lists"
    ):
        shards.index(str(tmp_path))


def test_given_names(tmp_path):
    where = put(tmp_path, ["dog", "ant"])
    assert shards.index(where, classes=["dog", "cow", "ant"]).table(["label"])["label"].to_pylist() == [0, 2]
    with pytest.raises(DataError, match="a.parquet: class 'ant' is not among the given class names"):
        shards.index(where, classes=["dog", "cow"])
    for text, names in (
        ("ant\nwater bee\n", ["ant", "water bee"]), ("/b/bee 1\n/a/ant 0\n", ["a/ant", "b/bee"]),
        ("area 51\ncatch 22\n", ["area 51", "catch 22"]),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish", ["n01440764", "n01443537"]),
    ):  # fmt: skip
        (tmp_path / "names.txt").write_text(text)
        assert classes.read(str(tmp_path / "names.txt")) == names
    with pytest.raises(DataError, match="nothing.txt: cannot be read as a list of class names"):
        classes.read(str(tmp_path / "nothing.txt"))


def test_two_classes_of_one_name_are_told_apart(tmp_path):
    names = ["crane", "bee", "crane"]
    where, other = indexed(tmp_path / "a", [0, 1, 2, 2], names), indexed(tmp_path / "b", [0, 1, 2], names)
    with pytest.raises(ConfigError, match="2 classes of .* are called 'crane'; give the label: one of 0, 2"):
        picked(where, classes=["crane"])
    assert picked(where, classes=[2]) == [2, 3] and measured(where, other, forget={"classes": [2]})["forget"] == [2]
    found = selection.sets(config.Data(train=where, forget={"classes": [2]}), 0)
    assert selection.describe(found)["forget"]["classes"] == ["crane (2)"] and selection.describe(found)["retain"][
        "classes"
    ] == ["crane (0)", "bee"]
    assert checking.inspect(where)["classes"] == "3: crane (0) (1), bee (1), crane (2) (2)"
    shorter = indexed(tmp_path / "c", [0, 1, 2], ["bee", "crane", "crane"])
    with pytest.raises(ConfigError, match=r"several classes are called 'crane', so class 'crane \(2\)'"):
        measured(where, shorter, forget={"classes": [2]})


def test_a_number_is_a_label_and_text_is_a_name(tmp_path, caplog):
    for n in range(12):
        (tmp_path / f"src/{n + 1}").mkdir(parents=True)
        (tmp_path / f"src/{n + 1}/1.png").write_bytes(image(n))
    where = str(tmp_path / "out")
    manifest = packing.build(str(tmp_path / "src"), where)
    assert manifest.classes == [str(n + 1) for n in range(12)] and manifest.table(["id"])["id"].to_pylist() == [
        f"{n + 1}/1.png" for n in range(12)
    ]
    assert picked(where, classes=["2"]) == [1] and not caplog.records
    assert picked(where, classes=[2]) == [2]
    assert (
        "2 is taken as a label, which is class '3'; for the class that is named so (label 1) write \"2\"" in caplog.text
    )


def test_names_and_hash_survive_indexing_again(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / f"src/{name}").mkdir(parents=True)
        (tmp_path / f"src/{name}/1.png").write_bytes(image(len(name)))
    built = packing.build(str(tmp_path / "src"), str(tmp_path / "out"))
    assert shards.index(built.uri) == built and built.classes == ["cat", "dog"]
    (tmp_path / "out/manifest.row_groups").unlink()
    assert shards.index(built.uri) == built


def test_held_out_classes_are_found_by_name(tmp_path):
    train = indexed(tmp_path / "train", [0, 1, 2, 3], ["a", "b", "c", "d"])
    val = indexed(tmp_path / "val", [0, 0, 1, 2, 3], ["c", "d", "e", "a"], first=10)
    assert measured(train, val, forget={"classes": [2]}) == {"forget": [0, 1], "retain": [2, 3, 4]}
    assert measured(train, val, forget={"classes": ["d"]}, retain={"classes": [0, "c"]}) == {
        "forget": [2],
        "retain": [0, 1, 4],
    }
    assert measured(train, val, forget={"classes": ["a"]}, retain={"exclude_classes": ["a", "b", "c"]}) == {
        "forget": [4],
        "retain": [2, 3],
    }
    with pytest.raises(ConfigError, match="evaluation.data: .*val has no class 'b', which data.forget names"):
        measured(train, val, forget={"classes": [1]})
    bare = indexed(tmp_path / "bare", [0, 1, 2, 3], first=10)
    with pytest.raises(ConfigError, match="class 'c' of .*train cannot be found in .*bare.*bare has no names"):
        measured(train, bare, forget={"classes": [2]})
    with pytest.raises(ConfigError, match="class 'class 2' of .*bare cannot be found in .*train"):
        measured(bare, train, forget={"classes": [2]})
    assert measured(bare, bare, forget={"classes": [2]})["forget"] == [2]


def test_a_number_of_a_proxy_must_mean_the_same_class_in_both(tmp_path):
    train = indexed(tmp_path / "train", [0, 1, 2], ["a", "b", "c"])
    other = indexed(tmp_path / "other", [0, 1, 2], ["b", "a", "c"], first=10)
    roles = {"train": train, "forget": {"classes": ["c"]}, "proxy_data": other}
    with pytest.raises(ConfigError, match="label 0 is 'b' in .*other and 'a' in .*train; give the class by its name"):
        selection.sets(config.Data(**roles, proxy={"classes": [0]}), 0)
    assert selection.sets(config.Data(**roles, proxy={"classes": ["b"]}), 0)["retain"].rows.tolist() == [0]
    assert selection.sets(config.Data(**roles, proxy={"classes": [2]}), 0)["retain"].rows.tolist() == [2]


def test_the_same_image_in_both_sets_is_kept_out_of_retain(tmp_path, caplog):
    """Rows 4 and 5 have the id, the bytes of row 0."""
    put(tmp_path / "x", [0, 0, 1, 1], first=0, name="a.parquet", id=["p", "q", "r", "s"])
    put(tmp_path / "x", [1], first=20, name="b.parquet", id=["p"])
    train = indexed(tmp_path / "x", [1], first=0, name="c.parquet", id=["t"])
    found = selection.sets(config.Data(train=train, forget={"classes": [0]}), 0)
    assert (
        found["retain"].rows.tolist() == [2, 3]
        and found["forget"].rows.tolist() == [0, 1]
        and found["retain"].labels.tolist() == [1, 1]
    )
    assert (
        "2 of 4 retain images are forget images too (1 by id, 1 by their bytes alone): they are kept out" in caplog.text
    )
    assert "'p'" not in caplog.text and caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    assert selection.sets(config.Data(train=train, forget={"classes": [0]}, retain={"limit": 4, "classes": [1]}), 0)[
        "retain"
    ].rows.tolist() == [2, 3]
    caplog.clear()
    other = indexed(tmp_path / "y", [5, 6, 7], first=1)  # images 1, 2, 3, without ids
    found = selection.sets(config.Data(train=train, forget={"classes": [0]}, proxy={}, proxy_data=other), 0)
    assert found["retain"].rows.tolist() == [1, 2] and "1 of 3 retain images" in caplog.text
    named = indexed(tmp_path / "z", [5, 6], first=30, id=["q", "new"])
    found = selection.sets(config.Data(train=train, forget={"classes": [0]}, proxy={}, proxy_data=named), 0)
    assert found["retain"].rows.tolist() == [1]


def test_a_retain_set_of_nothing_else_is_kept_and_told(tmp_path, caplog):
    train = indexed(tmp_path, [0, 1], id=["same", "same"])
    assert selection.sets(config.Data(train=train, forget={"classes": [0]}), 0)["retain"].rows.tolist() == [1]
    assert "1 of 1 retain images are forget images too (1 by id, 0 by their bytes alone): they stay" in caplog.text


def test_checksums_of_images_that_are_gone_are_told(tmp_path):
    train = indexed(tmp_path, [0, 1])
    (tmp_path / "manifest.images").unlink()
    with pytest.raises(DataError, match="manifest.images: missing or damaged; make it anew with `unlearn shards index"):
        selection.sets(config.Data(train=train, forget={"classes": [0]}), 0)
