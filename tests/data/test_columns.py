"""Parquet files as others write them: columns of other names and types, in place; or one error that names the file."""

import datetime
import decimal
import json
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import encode

from unlearn import config
from unlearn.data import checking, columns, selection, shards
from unlearn.errors import ConfigError, DataError

PNGS = [encode(np.full((6, 6, 3), 10 * i, np.uint8)) for i in range(4)]
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def put(path, images=None, name: str = "a.parquet", about: dict | None = None, **columns) -> str:
    """A file of four rows with these columns, among them `image` unless it is given."""
    images = pa.array([{"bytes": p, "path": None} for p in PNGS], STRUCT) if images is None else images
    table = pa.table(({"image": images} if images is not False else {}) | columns)
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(about), path / name, row_group_size=2)
    return str(path)


def chosen(where: str, **conditions) -> list[int]:
    return selection.select(shards.load(where), config.Rows(**conditions), 0, "forget").rows.tolist()


def labels(manifest: shards.Manifest) -> list[int]:
    return manifest.table(["label"])["label"].to_pylist()


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()),
        pa.struct({"bytes": pa.large_binary()})],
    ids=str,
)  # fmt: skip
def test_images_of_every_binary_kind(tmp_path, kind):
    values = [{"bytes": p} for p in PNGS] if pa.types.is_struct(kind) else PNGS
    values = (
        pa.array(values, pa.binary()).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    )
    manifest = shards.index(put(tmp_path, values, label=[0, 0, 1, 1]))
    assert [bytes(v) for g in (0, 1) for v in shards.images(manifest.read(g, ["image"]))] == PNGS
    assert all(group.checks.keys() == {"image", "label"} for group in manifest.shards[0].row_groups)
    assert checking.verify(str(tmp_path)) == 4


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2, 0, 2, 1], pa.uint8()), pa.array([2, 0, 2, 1], pa.uint64()), pa.array([2.0, 0, 2, 1]),
        pa.array([2, 0, 2, 1], pa.float32()),
        pa.array([decimal.Decimal(v) for v in ("2.00", "0.00", "2.00", "1.00")]), pa.array([[2], [0], [2], [1]]),
        pa.array([[2], [0], [2], [1]], pa.list_(pa.int16(), 1)), pa.array([2, 0, 2, 1]).dictionary_encode(),
    ],
    ids=lambda v: str(v.type),
)  # fmt: skip
def test_labels_of_every_kind_that_is_a_whole_number(tmp_path, values):
    manifest = shards.index(put(tmp_path, label=values))
    assert labels(manifest) == [2, 0, 2, 1] and manifest.classes == []
    assert [g.labels for g in manifest.shards[0].row_groups] == [(0, 2), (1, 2)] and chosen(
        str(tmp_path), classes=[2]
    ) == [0, 2]


@pytest.mark.parametrize(
    "values",
    [pa.array(["dog", "ant", "dog", "bee"]), pa.array(["dog", "ant", "dog", "bee"], pa.large_string()),
        pa.array(["dog", "ant", "dog", "bee"], pa.string_view()),
     pa.array(["dog", "ant", "dog", "bee"]).dictionary_encode(), pa.array([["dog"], ["ant"], ["dog"], ["bee"]])],
    ids=lambda v: str(v.type),
)  # fmt: skip
def test_labels_as_text_are_class_names(tmp_path, values):
    manifest = shards.index(put(tmp_path, label=values))
    assert (
        manifest.classes == ["ant", "bee", "dog"]
        and labels(manifest) == [2, 0, 2, 1]
        and manifest == shards.load(str(tmp_path))
    )
    assert chosen(str(tmp_path), classes=["dog"]) == [0, 2] and chosen(str(tmp_path), classes=["bee", 0]) == [1, 3]


def test_text_labels_of_several_files_have_one_list_and_numbers_their_order(tmp_path):
    put(tmp_path, name="a.parquet", label=["10", "2", "2", "10"])
    put(tmp_path, name="b.parquet", label=["9", "9", "2", "9"])
    manifest = shards.index(str(tmp_path))
    assert manifest.classes == ["2", "9", "10"] and labels(manifest) == [2, 0, 0, 2, 1, 1, 0, 1]


@pytest.mark.parametrize(
    "values, message",
    [
        (pa.array([1, 2**63 + 5, 0, 0], pa.uint64()), "9223372036854775813"),
        (pa.array([1, -1, 0, 0]), "label -1, and labels are 0 or more.*--split"),
        (pa.array([1, 0.5, 0, 0]), "0.5"),
        (pa.array([1, float("nan"), 0, 0]), "no label"),
        (pa.array([[1], [1, 2], [0], [0]]), "several labels"),
        (pa.array(["a", None, "a", "a"]), r"1 row\(s\) have no label"),
        (pa.nulls(4), "column `label` is null, and the label must be whole numbers"),
        (pa.array([{"a": 1}] * 4), "column `label` is struct"),
    ],
    ids=str,
)
def test_labels_that_are_none_are_refused(tmp_path, values, message):
    with pytest.raises(DataError, match=f"a.parquet.*{message}"):
        shards.index(put(tmp_path, label=values))


WORDS = ["a", "b", "c", "d"]
UUIDS = [uuid.UUID(int=i) for i in range(4)]


@pytest.mark.parametrize("role", ["id", "subject"])
@pytest.mark.parametrize(
    "values, texts",
    [
        (pa.array([5, 6, 7, 8]), ["5", "6", "7", "8"]),
        (pa.array([5, 6, 7, 2**64 - 1], pa.uint64()), ["5", "6", "7", str(2**64 - 1)]),
        (pa.array([decimal.Decimal(i) for i in range(4)], pa.decimal128(5, 0)), ["0", "1", "2", "3"]),
        (pa.array([w.encode() for w in WORDS]), WORDS),
        (pa.array([w.encode() for w in WORDS], pa.large_binary()), WORDS),
        (pa.array([w.encode() for w in WORDS], pa.binary(1)), ["61", "62", "63", "64"]),
        (pa.array(WORDS).dictionary_encode(), WORDS),
        (pa.array(WORDS, pa.string_view()), WORDS),
        (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([u.bytes for u in UUIDS], pa.binary(16))),
            [str(u) for u in UUIDS]),
    ],
    ids=lambda v: str(v.type) if isinstance(v, pa.Array) else "",
)  # fmt: skip
def test_ids_and_subjects_are_matched_as_text(tmp_path, role, values, texts):
    where = put(tmp_path, label=[0, 0, 1, 1], **{role: values})
    shards.index(where)
    assert [chosen(where, **{f"{role}s": [text]}) for text in texts] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("role", ["id", "subject"])
@pytest.mark.parametrize(
    "values, message",
    [
        (pa.array([1.0, float("nan"), 2, 3]), "is double"), (pa.array([["p"], ["q"], ["r"], ["s"]]), "is list"),
        (pa.nulls(4), "is null"),
        (pa.array([True] * 4), "is bool"), (pa.array([datetime.date(2020, 1, 1)] * 4), "is date32"),
        (pa.array([b"a", b"\xff", b"c", b"d"]), "UTF"),
    ],
    ids=str,
)  # fmt: skip
def test_ids_and_subjects_that_are_no_text_are_refused(tmp_path, role, values, message):
    with pytest.raises(DataError, match=f"a.parquet.*{message}"):
        shards.index(put(tmp_path, label=[0] * 4, **{role: values}))
    assert shards.index(str(tmp_path), columns={role: "none"}).columns == ["image", "label"]


def test_a_subject_may_be_missing_and_an_id_may_not(tmp_path):
    where = put(tmp_path, label=[0] * 4, subject=["p", None, "q", None])
    shards.index(where)
    assert chosen(where, subjects=["p"]) == [0]
    with pytest.raises(DataError, match=r"a.parquet, row group 1: 1 row\(s\) have no id"):
        shards.index(put(tmp_path, label=[0] * 4, id=["p", "q", "r", None]))


@pytest.mark.parametrize(
    "images",
    [pa.array([{"path": "a"}] * 4), pa.array([{"bytes": "text"}] * 4), pa.array(["a"] * 4), pa.array([[b"a"]] * 4)],
    ids=str,
)
def test_images_that_are_none_are_refused(tmp_path, images):
    with pytest.raises(DataError, match="a.parquet: needs a column `image`.*found image"):
        shards.index(put(tmp_path, images, label=[0] * 4))


def test_columns_of_other_names_are_guessed_where_plain_and_else_named(tmp_path):
    images = pa.array([{"bytes": p, "path": None} for p in PNGS], STRUCT)
    put(tmp_path / "cifar", False, img=images, md5=pa.array([b"1"] * 4), fine_label=[3, 1, 0, 2])
    manifest = shards.index(str(tmp_path / "cifar"))
    assert manifest.names == {"image": "img", "label": "fine_label"} and labels(manifest) == [3, 1, 0, 2]
    assert [bytes(v) for v in shards.images(manifest.read(0, ["image"]))] == PNGS[:2]
    assert shards.load(manifest.uri) == manifest and checking.verify(manifest.uri) == 4
    assert checking.inspect(manifest.uri)["columns"] == "image (img), label (fine_label)"
    put(tmp_path / "two", False, img=images, fine_label=[3, 1, 0, 2], coarse_label=[1, 0, 0, 1], key=WORDS)
    with pytest.raises(
        DataError, match="a.parquet: fine_label or coarse_label may be the label; say which with --label-column"
    ):
        shards.index(str(tmp_path / "two"))
    manifest = shards.index(str(tmp_path / "two"), columns={"label": "coarse_label", "id": "key"})
    assert labels(manifest) == [1, 0, 0, 1] and chosen(manifest.uri, ids=["c"]) == [2]
    assert shards.index(manifest.uri) == manifest  # what was said is kept
    with pytest.raises(DataError, match="no column 'fine' for the label; it has img, fine_label, coarse_label, key"):
        shards.index(manifest.uri, columns={"label": "fine"})
    put(tmp_path / "both", False, before=images, after=images, label=[0] * 4)
    with pytest.raises(DataError, match="needs a column `image`.*--image-column; found before"):
        shards.index(str(tmp_path / "both"))
    assert shards.index(str(tmp_path / "both"), columns={"image": "after"}).names == {"image": "after"}


def test_a_class_label_of_another_name_is_found_with_its_names(tmp_path):
    about = {
        "huggingface": json.dumps({"info": {"features": {"animal": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}})
    }
    where = put(tmp_path, about=about, animal=[1, 0, 0, 1], y=[0, 0, 0, 0])
    assert shards.index(where).names == {"label": "animal"} and chosen(where, classes=["bee"]) == [0, 3]


def test_what_is_no_table_of_images_is_refused(tmp_path):
    twice = pa.Table.from_arrays([pa.array([b"x"]), pa.array([0]), pa.array([1])], ["image", "label", "label"])
    (tmp_path / "twice").mkdir()
    pq.write_table(twice, tmp_path / "twice/a.parquet")
    with pytest.raises(DataError, match="several columns called 'label'"):
        shards.index(str(tmp_path / "twice"))
    (tmp_path / "twice/a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="a.parquet is a pointer of git-lfs, not the file itself"):
        shards.index(str(tmp_path / "twice"))
    pq.write_table(twice.slice(0, 0).select([0, 1]), tmp_path / "twice/a.parquet")
    with pytest.raises(DataError, match="its Parquet files hold no row"):
        shards.index(str(tmp_path / "twice"))


def test_labels_are_not_needed_where_rows_are_chosen_by_id_or_subject(tmp_path):
    where = put(tmp_path, id=WORDS, subject=["p", "p", "q", "q"])
    assert shards.index(where).columns == ["image", "id", "subject"]
    found = selection.sets(config.Data(train=where, forget={"ids": ["b"]}), 0)
    assert (
        found["forget"].rows.tolist() == [1]
        and found["retain"].rows.tolist() == [0, 2, 3]
        and found["retain"].labels.tolist() == [-1] * 3
    )
    assert selection.describe(found)["retain"]["classes"] == [] and chosen(where, subjects=["q"]) == [2, 3]
    assert checking.inspect(where)["classes"] == "none" and checking.verify(where) == 4
    for conditions in ({"classes": [0]}, {"exclude_classes": [0]}, {"per_class": 1}):
        with pytest.raises(ConfigError, match="have no labels; choose rows by ids or subjects"):
            chosen(where, **conditions)
    bare = put(tmp_path / "bare")
    assert shards.index(bare).columns == ["image"] and chosen(bare, ids=["a.parquet:2"]) == [2]
    assert selection.name_row(shards.load(bare), 3) == "a.parquet:3"
    put(tmp_path, name="b.parquet", id=["e", "f", "g", "h"], subject=["p"] * 4, label=[0] * 4)
    with pytest.raises(DataError, match="a.parquet: has no label, and files beside it have"):
        shards.index(where)


def test_hive_partitions_and_suffixes(tmp_path):
    put(tmp_path / "n", name="label=10/a.PARQUET", id=WORDS)
    put(tmp_path / "n", name="label=3/b.pq", id=[w * 2 for w in WORDS])
    manifest = shards.index(str(tmp_path / "n"))
    assert (
        labels(manifest) == [10] * 4 + [3] * 4
        and chosen(manifest.uri, classes=[3]) == [4, 5, 6, 7]
        and manifest.columns == ["image", "label", "id"]
    )
    put(tmp_path / "t", name="label=sea%20lion/subject=07/a.parquet")
    put(tmp_path / "t", name="label=ant/subject=8/a.parquet")
    manifest = shards.index(str(tmp_path / "t"))
    assert manifest.classes == ["ant", "sea lion"] and chosen(manifest.uri, classes=["sea lion"]) == chosen(
        manifest.uri, subjects=["07"]
    ) == [4, 5, 6, 7]


@pytest.mark.parametrize("zeros", [0, 1, 30, 5000])
def test_a_label_of_the_path_is_a_number_of_64_bits(zeros):
    def label(value: str) -> list[int]:
        return columns.of_path(f"label={'0' * zeros}{value}/a.parquet", "label", "label", 1, "a").to_pylist()

    assert label("0") == [0] and label("7") == [7] and label(f"{(1 << 63) - 1}") == [(1 << 63) - 1]
    for value in (f"{1 << 63}", "9" * 20, "1" + "0" * 25, "9" * 5000):
        with pytest.raises(DataError, match="its path gives a label over 2"):
            label(value)


def test_the_checksum_does_not_depend_on_how_values_are_stored():
    once = columns.checksum([pa.array(PNGS)])
    assert (
        once
        == columns.checksum([pa.array(PNGS[:1]), pa.array(PNGS[1:], pa.large_binary())])
        == columns.checksum([pa.array([b"", *PNGS])[1:]])
    )
    others = [
        PNGS[::-1],
        PNGS[:3],
        [PNGS[0] + PNGS[1], b"", *PNGS[2:]],
        [PNGS[0][:-1], PNGS[0][-1:] + PNGS[1], *PNGS[2:]],
    ]
    assert once not in [columns.checksum([pa.array(other)]) for other in others]
    assert (
        columns.checksum([pa.array([1, 2, 3])])
        == columns.checksum([pa.array([0, 1])[1:], pa.array([2, 3])])
        != columns.checksum([pa.array([1, 3, 2])])
    )
    assert columns.checksum([]) == columns.checksum([pa.array([], pa.binary())])
