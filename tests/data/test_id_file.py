"""Rows that are chosen by a file of ids."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.memory import counted

from unlearn import config
from unlearn.data import id_file, selection, shards
from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError, ConfigError
from unlearn.run import resolve
from unlearn.training.checkpoint import TrainerState

WANTED = ["img-047", "img-003"]


def stored(folder, name: str, text: str | bytes) -> str:
    Storage(folder).write(name, text if isinstance(text, bytes) else text.encode())
    return Storage(folder).where(name)


def forgotten(where: str, uri: str, **more) -> list[int]:
    return selection.select(shards.load(where), config.Rows(ids_from=uri, **more), 0, "forget").rows.tolist()


@pytest.mark.parametrize(
    "name, text, more",
    [
        ("a.csv", "date,Image_ID,why\n1,img-047,x\n2, img-003 ,\n2,img-003,\n3,,\n", {}),
        ("a.csv", 'why,given\n"a, b\nc",img-047\n,img-003', {"ids_column": "given"}),
        ("a.tsv", "id\tid2\nimg-003\timg-001\nimg-047\timg-002\n", {}),
        ("a.txt", "img-047\r\n\r\nimg-003\r\nimg-003\r\n", {}),
    ],
)
def test_a_table_or_a_list_of_ids_chooses_its_rows(place, tiny_shards, name, text, more):
    assert forgotten(tiny_shards, stored(place, name, text), **more) == [3, 47]


def test_parquet_and_other_conditions(tiny_shards, tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [1, 2], "key": pa.array(WANTED).dictionary_encode()}), path)
    assert forgotten(tiny_shards, path) == [3, 47]
    assert forgotten(tiny_shards, path, classes=["ant"]) == [3] and forgotten(tiny_shards, path, ids=["img-047"]) == [
        47
    ]


def test_numbers_keep_their_zeros(tmp_path):
    assert id_file.read(stored(tmp_path, "a.csv", "id\n007\n8\n"), None, "x").values.to_pylist() == ["007", "8"]


def test_what_cannot_be_meant_is_told_without_a_value(tiny_shards, tmp_path, logged):
    """What is in such a file is personal."""
    cases = {
        "no-column.csv": ("img-003\nimg-047\n", "no column that is plainly of ids"),
        "ragged.csv": ("id,x\nimg-003,1\nimg-047,1,1\n", "cannot be read"),
        "empty.csv": ("", "is empty"),
        "blank.txt": ("\n \n", "holds no id"),
        "none.txt": ("img-999\nimg-998\n", "none of its 2 ids is a row"),
        "bytes.txt": (b"\xff\xfe\n", "cannot be read"),
        "broken.parquet": ("img-003", "cannot be read"),
        "strange.xlsx": ("img-003", "give a .csv"),
    }
    for name, (text, message) in cases.items():
        with pytest.raises(ConfigError, match=message) as e:
            forgotten(tiny_shards, stored(tmp_path, name, text))
        assert "img-" not in str(e.value) and name in str(e.value)
    pq.write_table(pa.table({"id": [0.5]}), tmp_path / "float.parquet")
    with pytest.raises(ConfigError, match="its ids are double"):
        forgotten(tiny_shards, str(tmp_path / "float.parquet"))
    with pytest.raises(ConfigError, match="no column 'b' among its 1"):
        forgotten(tiny_shards, stored(tmp_path, "a.csv", "a\n1\n"), ids_column="b")
    assert forgotten(tiny_shards, stored(tmp_path, "some.txt", "img-003\nimg-998\nimg-999\n")) == [3]
    assert "2 of 3 ids match no row" in logged.text and "img-" not in logged.text


def test_what_is_missing_ends_the_check_of_a_config(told, written):
    code, _, err = told("config", "check", written("data.forget={ids_from: /nowhere/a.csv}"))
    assert code == 2 and "/nowhere/a.csv: there is no such file" in err
    code, _, err = told("config", "check", written("data.forget={ids_column: x}"))
    assert code == 2 and "data.forget.ids_column is given without ids_from" in err


def test_another_content_is_another_run_and_another_place_is_not(tiny_run, tmp_path):
    def run(name: str, text: str):
        uri = stored(tmp_path, name, text)
        return resolve(tiny_run(f"data.forget={{ids_from: {uri}}}", "data.retain={classes: [bee]}"))

    first, moved, other = run("a.csv", "id\nimg-003\n"), run("b.csv", "id\nimg-003\n"), run("a.csv", "id\nimg-003\n\n")
    assert first.origin["forget.ids_from"] == moved.origin["forget.ids_from"] != other.origin["forget.ids_from"]
    assert first.settings.hash() == moved.settings.hash() == other.settings.hash() != tiny_run().hash()
    state = TrainerState(1, 8, first.settings.hash(), first.origin, 1)
    state.check(moved, "here")
    with pytest.raises(CheckpointError, match=r"the data has changed since \(forget.ids_from\)"):
        state.check(other, "here")


def test_a_million_ids_take_the_memory_of_their_column(tmp_path):
    """Not that of the table, which is over 100 MB here, nor of a Python object for each, which are over 60."""
    path, count = tmp_path / "a.csv", 1_000_000
    numbers = np.arange(count)
    path.write_text("why,id\n" + "".join(f"{'because of something ' * 2},{n:010d}\n" for n in numbers.tolist()))
    id_file.read(stored(tmp_path, "b.csv", "id\n1\n"), None, "x")  # what the first reading of a process takes once
    ids, buffers, objects = counted(lambda: id_file.read(str(path), None, "x"))
    assert len(ids.values) == count and ids.values[7].as_py() == "0000000007"
    assert buffers < 95 << 20 and objects < 10 << 20, (buffers >> 20, objects >> 20)
