"""Which rows are forgotten, retained, proxies."""

import dataclasses
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.images import tiny_table
from support.memory import counted

from unlearn import config
from unlearn.data import checking, row_values, selection, shards
from unlearn.data.row_batches import RowBatches
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, DataError, StorageError


def select(where: str, seed: int = 0, **conditions) -> list[int]:
    return selection.select(shards.load(where), config.Rows(**conditions), seed, "forget").rows.tolist()


def sets(where: str, seed: int = 0, **roles) -> dict[str, list[int]]:
    found = selection.sets(config.Data(train=where, **roles), seed)
    return {name: rows.rows.tolist() for name, rows in found.items()}


@pytest.fixture(scope="module")
def no_ids(tmp_path_factory) -> str:
    """The small data set without ids and subjects, its second shard shorter, so that row numbers are not a product."""
    folder = tmp_path_factory.mktemp("no-ids")
    for number, (first, count) in enumerate(((0, 16), (16, 11), (32, 16))):
        table = tiny_table(first, count).select(["image", "label"])
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=8)
    shards.index(str(folder))
    return str(folder)


def test_by_class_name_and_number(tiny_shards):
    assert select(tiny_shards, classes=["bee"]) == select(tiny_shards, classes=[1]) == list(range(12, 24))
    assert select(tiny_shards, classes=["dog", 0]) == [*range(12), *range(36, 48)]
    assert select(tiny_shards, exclude_classes=["ant", 2]) == [*range(12, 24), *range(36, 48)]
    assert select(tiny_shards, classes=[0, 1], exclude_classes=["bee"]) == list(range(12))
    assert select(tiny_shards) == list(range(48))


def test_by_id_subject_and_all_conditions_together(tiny_shards):
    assert select(tiny_shards, ids=["img-047", "img-003"]) == [3, 47]
    assert select(tiny_shards, subjects=["person-3"]) == list(range(3, 48, 5))
    assert select(tiny_shards, subjects=["person-3"], classes=["ant"]) == [3, 8]
    assert select(tiny_shards, classes=["ant"], ids=["img-001"]) == [1]


def test_rows_without_ids_are_named_by_shard_and_row(no_ids):
    assert select(no_ids, ids=["part-1.parquet:10", "part-2.parquet:0", "part-0.parquet:15"]) == [15, 26, 27]
    manifest = shards.load(no_ids)
    assert [selection.name_row(manifest, r) for r in (0, 16, 26, 27)] == [
        "part-0.parquet:0", "part-1.parquet:0", "part-1.parquet:10", "part-2.parquet:0",
    ]  # fmt: skip


def test_empty_files_and_row_groups_shift_no_name(tmp_path):
    table = tiny_table(0, 24).select(["image", "label"])
    pq.ParquetWriter(tmp_path / "a.parquet", table.schema).close()  # no row group
    pq.write_table(table.slice(0, 8), tmp_path / "b.parquet")
    with pq.ParquetWriter(tmp_path / "c.parquet", table.schema) as writer:
        for rows in (table.slice(0, 0), table.slice(8, 4), table.slice(0, 0), table.slice(12, 4), table.slice(0, 0)):
            writer.write_table(rows)
    pq.ParquetWriter(tmp_path / "d.parquet", table.schema).close()
    pq.write_table(table.slice(0, 0), tmp_path / "e.parquet")
    pq.write_table(table.slice(16, 8), tmp_path / "f.parquet")
    manifest, where = shards.index(str(tmp_path)), str(tmp_path)
    assert [s.path[0] for s in manifest.shards if not s.row_groups] == ["a", "d"] and manifest.rows == 24
    names = [
        *(f"b.parquet:{i}" for i in range(8)),
        *(f"c.parquet:{i}" for i in range(8)),
        *(f"f.parquet:{i}" for i in range(8)),
    ]
    assert selection.identity(manifest, manifest.table(["label"])) == names
    assert [selection.name_row(manifest, row) for row in range(24)] == names
    assert [select(where, ids=[name]) for name in names] == [[row] for row in range(24)]
    assert select(where, classes=[0]) == list(range(12)) and select(where, classes=[1]) == list(range(12, 24))
    assert select(where, exclude_classes=[0]) == list(range(12, 24)) and select(where) == list(range(24))


@given(st.integers(1, 15), st.integers(1, 60), st.integers(0, 50))
def test_per_class_and_limit_draw_with_the_seed(tiny_shards, per_class, limit, seed):
    rows = np.array(select(tiny_shards, seed, per_class=per_class, limit=limit))
    assert len(rows) == min(limit, 4 * min(per_class, 12)) and (np.diff(rows) > 0).all()
    assert max(np.bincount(rows // 12)) <= per_class
    assert rows.tolist() == select(tiny_shards, seed, per_class=per_class, limit=limit)


def test_seeds_draw_other_rows_and_labels_go_with_them(tiny_shards):
    draws = {tuple(select(tiny_shards, seed, per_class=3)) for seed in range(20)}
    assert len(draws) == 20 and set().union(*draws) == set(range(48))
    found = selection.select(shards.load(tiny_shards), config.Rows(per_class=3, limit=7), 1, "retain")
    assert (
        found.labels.tolist() == (found.rows // 12).tolist()
        and np.repeat(found.touched, found.counts[found.touched]).tolist() == (found.rows // 8).tolist()
    )


def test_only_row_groups_that_can_hold_the_class_are_read(tiny_shards, tmp_path):
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    (copy / "shard-2.parquet").write_bytes(b"gone")
    assert select(str(copy), classes=["ant", "bee"]) == list(range(24))
    with pytest.raises(DataError, match="shard-2.parquet"):
        select(str(copy), classes=["dog"])


def test_retain_is_the_rest_and_a_proxy_stands_in_its_role(tiny_shards, no_ids):
    forget = {"classes": ["ant"], "limit": 5}
    rest = sets(tiny_shards, forget=forget)
    assert sorted(rest["forget"] + rest["retain"]) == list(range(48)) and len(rest["forget"]) == 5
    assert sets(tiny_shards) == {"retain": list(range(48))}
    assert sets(tiny_shards, forget=forget, proxy={"classes": ["cat"]})["retain"] == list(range(24, 36))
    other = selection.sets(config.Data(train=tiny_shards, forget=forget, proxy={}, proxy_data=no_ids), 0)
    # Without five that are forgotten: they are the same images.
    assert len(other["retain"]) == 38 and other["retain"].manifest.uri == no_ids


@pytest.mark.parametrize(
    "roles, message",
    [
        (
            {"forget": {"classes": [0, 1]}, "retain": {"classes": ["bee"]}},
            "overlap in 12 image.* for example row 4 of row group 1 of shard-0.parquet",
        ),
        (
            {"forget": {"subjects": ["person-1"]}, "proxy": {"classes": ["ant"]}},
            "overlap in 3 image.* for example row 1 of row group 0 of shard-0.parquet",
        ),
        ({"forget": {}}, "selects every image: nothing is left to retain"),
        ({"forget": {"classes": []}}, "the forget set is empty"),
        ({"forget": {"classes": ["ant"], "subjects": ["person-0"], "exclude_classes": [0]}}, "forget"),
        ({"forget": {"classes": ["cow"]}}, "data.forget.classes: no class 'cow'.*it has ant, bee, cat, dog"),
        ({"retain": {"exclude_classes": [9]}}, "data.retain.exclude_classes: no class 9.*from 0 to 3"),
        (
            {"forget": {"ids": ["img-001", "img-1"]}},
            "data.forget.ids: 1 of 2 not found, for example number 2 of the list",
        ),
        (
            {"forget": {"classes": [], "ids": ["img-001"]}},
            "data.forget.ids: 1 of 1 not found, for example number 1 of the list",
        ),
        ({"forget": {"classes": [], "subjects": ["person-1"]}}, "data.forget.subjects: 1 of 1 not found"),
        (
            {"forget": {"subjects": ["nobody"]}},
            "data.forget.subjects: 1 of 1 not found, for example number 1 of the list",
        ),
    ],
)
def test_a_selection_that_cannot_be_is_told(tiny_shards, roles, message):
    with pytest.raises(ConfigError, match=message):
        sets(tiny_shards, **roles)


def test_what_the_shards_do_not_have_is_told(no_ids):
    with pytest.raises(ConfigError, match="no column `subject`"):
        select(no_ids, subjects=["person-1"])
    with pytest.raises(ConfigError, match="labels without names: use numbers"):
        select(no_ids, classes=["ant"])


def test_overlap_is_found_between_copies_of_the_same_shards(tiny_shards, tmp_path):
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    with pytest.raises(ConfigError, match="overlap in 12"):
        sets(tiny_shards, forget={"classes": ["ant"]}, proxy={}, proxy_data=str(copy))


def test_describe_names_no_image(tiny_shards):
    found = selection.sets(config.Data(train=tiny_shards, forget={"classes": [2], "limit": 3}), 0)
    about = selection.describe(found)
    assert about["forget"] == {"images": 3, "classes": ["cat"], "manifest": shards.load(tiny_shards).hash}
    assert about["retain"]["images"] == 45 and "img" not in str(about)


@pytest.mark.parametrize(
    "roles, opened",
    [
        ({"forget": {"classes": ["ant"]}}, "012"),
        ({"forget": {"ids": ["img-001"]}, "retain": {"subjects": ["person-2"]}}, "012"),
        ({"forget": {"classes": ["ant"], "limit": 3}, "retain": {"classes": ["bee"]}}, "01"),
        ({"forget": {"classes": ["dog"]}, "retain": {"exclude_classes": ["dog"], "per_class": 2}}, "012"),
        ({"forget": {"classes": ["ant"]}, "proxy": {"classes": ["bee"]}, "proxy_data": "the same"}, "01"),
    ],
)
def test_without_a_file_of_values_each_shard_is_opened_once_at_most(s3, proxied, tiny_shards, roles, opened):
    for name in Storage(tiny_shards).files():
        Storage(s3).write(name, Storage(tiny_shards).read(name))
    shards.save(dataclasses.replace(shards.load(s3), values=""))
    expected = sets(tiny_shards, **roles | ({"proxy_data": tiny_shards} if "proxy_data" in roles else {}))
    proxied.requests.clear()
    proxied.headers.clear()
    assert sets(s3, **roles | ({"proxy_data": s3} if "proxy_data" in roles else {})) == expected
    # One request for the end of a file tells its size and its footer; none asks for its size alone.
    ends = [p for (_, p), h in zip(proxied.requests, proxied.headers, strict=True) if h.get("Range") == "bytes=-65536"]
    assert "".join(str(i) for i in range(3) if any(f"shard-{i}.parquet" in path for path in ends)) == opened
    assert len(ends) == len(opened) and not proxied.count("HEAD", ".parquet")
    assert proxied.count("GET", shards.MANIFEST) == 1 and not proxied.count("GET", "manifest.json")


def test_what_shards_hold_is_told_without_a_look_at_them(s3, proxied, tiny_shards):
    for name in Storage(tiny_shards).files():
        Storage(s3).write(name, Storage(tiny_shards).read(name))
    proxied.requests.clear()
    assert checking.inspect(s3) == checking.inspect(tiny_shards)
    assert checking.inspect(s3)["classes"] == "4: ant (12), bee (12), cat (12), dog (12)"
    assert [proxied.count("HEAD", f"shard-{i}.parquet") for i in range(3)] == [0, 0, 0]


def test_verifying_downloads_each_shard_once(s3, proxied, tiny_shards):
    for name in Storage(tiny_shards).files():
        Storage(s3).write(name, Storage(tiny_shards).read(name))
    proxied.requests.clear()
    seen = []
    assert checking.verify(s3, progress=lambda *rows: seen.append(rows)) == 48
    assert seen == [(8 * i, 48) for i in range(1, 7)]
    assert [proxied.count("GET", f"shard-{i}.parquet") for i in range(3)] == [1, 1, 1]


def test_sets_are_the_same_in_another_process_and_small_on_the_way(tiny_shards):
    found = selection.sets(config.Data(train=tiny_shards, forget={"subjects": ["person-1"]}), 0)
    starts = {name: rows.starts.tolist() for name, rows in found.items()}
    copy = pickle.loads(pickle.dumps(found))
    assert copy["retain"].manifest is copy["forget"].manifest and copy["retain"].manifest == found["retain"].manifest
    assert copy["retain"].manifest.__dict__["hash"] == shards.load(tiny_shards).hash  # not computed again
    for name, rows in found.items():
        assert copy[name].rows.tolist() == rows.rows.tolist() and copy[name].labels.tolist() == rows.labels.tolist()
        assert (
            copy[name].rows.dtype == np.int32
            and copy[name].labels.dtype == rows.labels.dtype == np.int8
            and copy[name].starts.tolist() == starts[name]
        )
    manifest = found["retain"].manifest
    many = selection.RowSet(manifest, np.arange(5, 1_000_005), np.arange(1_000_000) % 200)
    assert len(many.starts) and len(pickle.dumps(many)) < 2_010_000 + len(pickle.dumps(manifest))


@given(st.lists(st.integers(0, 1 << 40), min_size=1, unique=True), st.integers(-(1 << 40), 1 << 40))
def test_any_rows_and_labels_survive_pickling(tiny_shards, rows, label):
    rows = np.array(sorted(rows))
    copy = pickle.loads(pickle.dumps(selection.RowSet(shards.load(tiny_shards), rows, np.full(len(rows), label))))
    assert copy.rows.tolist() == rows.tolist() and copy.labels.tolist() == [label] * len(rows)


@pytest.fixture
def many(s3, proxied) -> str:
    """Forty indexed shards on S3, whose requests are noted from now on."""
    for number in range(40):
        sink = pa.BufferOutputStream()
        pq.write_table(tiny_table(number, 3), sink, row_group_size=2)
        Storage(s3).write(f"part-{number:02d}.parquet", sink.getvalue().to_pybytes())
    shards.index(s3)
    proxied.requests.clear()
    return s3


def test_rows_are_chosen_by_few_requests_and_without_the_shards(many, proxied):
    found = sets(many, forget={"ids": ["img-007", "img-030"]})
    assert len(found["forget"]) == 6 and len(found["retain"]) == 114
    assert not proxied.count("GET", ".parquet") and not proxied.count("HEAD", ".parquet")
    assert len(proxied.requests) < 15 and proxied.count("GET", "manifest.images") == 1
    manifest = shards.load(many)
    from_shards = dataclasses.replace(manifest, values="")
    for columns, groups in ((["id", "label", "subject"], None), (["label"], [7, 3]), (["subject"], [])):
        assert manifest.table(columns, groups).equals(from_shards.table(columns, groups))
    assert proxied.count("GET", ".parquet"), "the control: shards are read where there is no such file"


def test_shards_that_are_not_those_of_the_manifest_are_told_before_they_are_read(many):
    Storage(many).write("part-03.parquet", b"PAR1" * 3)
    with pytest.raises(DataError, match=r"part-03.parquet: not the file of the manifest \(12 bytes in place of"):
        select(many, ids=["img-007"])
    Storage(many).delete("part-03.parquet")
    with pytest.raises(StorageError, match="part-03.parquet: there is no such file"):
        select(many, ids=["img-007"])
    Storage(many).write("manifest.rows", b"")
    shards.index(many)
    Storage(many).write("manifest.rows", Storage(many).read("manifest.rows")[:-9])
    with pytest.raises(DataError, match=r"manifest.rows: missing or damaged; make it anew with `unlearn shards index"):
        select(many, ids=["img-007"])


def test_pieces_are_larger_where_they_are_looked_up_in_a_long_list(tiny_shards, monkeypatch):
    monkeypatch.setattr(row_values, "GROUP", 8)
    batches = RowBatches(dataclasses.replace(shards.load(tiny_shards), values=""))
    pieces, larger = (list(batches.read(["id", "label"], range(6), listed)) for listed in (0, 80))
    assert [len(piece) for piece in pieces] == [8] * 6 and [len(piece) for piece in larger] == [24, 24]
    assert pa.concat_tables(larger).equals(pa.concat_tables(pieces))


def test_memory_of_a_large_set_is_its_row_numbers_and_labels(tmp_path):
    """By class, by a thousand ids, by a list of them, and drawn: 6 bytes a row stay, under 12 are taken meanwhile, and
    the columns are read in pieces of one size whatever the rows."""
    count = 400_000
    numbers = np.arange(count)
    columns = {
        "image": pa.nulls(count, pa.binary()),
        "label": numbers // 1000,
        "id": [f"image-{i:09d}" for i in range(count)],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=1000)
    ids = columns["id"][::400]
    del columns
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    shards.index(str(tmp_path))
    for chosen in ({"classes": [7]}, {"ids": ids}, {"ids_from": f"{tmp_path}/ids.txt"}, {"limit": 1000}):
        data = config.Data(train=str(tmp_path), forget=config.Rows(**chosen))
        found, buffers, objects = counted(lambda data=data: selection.sets(data, 0))
        retain = found["retain"]
        assert len(found["forget"]) == 1000 and len(retain) == count - 1000
        assert retain.rows.nbytes + retain.labels.nbytes == 6 * len(retain)
        assert objects < 12 * count + (5 << 20), f"{objects / count:.0f} bytes a row"
        assert buffers < 12 << 20, f"{buffers >> 20} MiB"
