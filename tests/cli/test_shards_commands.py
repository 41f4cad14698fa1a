"""`unlearn shards` on data of other people: what is said of it, and the options that tell which part is meant."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.command import refused
from support.images import encode, tiny_table


def hub(folder) -> str:
    """A folder as downloaded from a hub: two splits, image and label columns of other names."""
    table = tiny_table(0, 24)
    table = pa.table({"img": table["image"], "fine_label": table["label"], "coarse_label": pa.array([0] * 24)})
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", table.slice(0, 16)), ("test", table.slice(16))):
        pq.write_table(rows, folder / f"data/{split}-00000-of-00001.parquet")
    return str(folder)


def test_a_hub_folder_is_indexed_by_split_and_column(told, tmp_path):
    where = hub(tmp_path / "hub")
    assert "holds several splits: test, train; choose one with --split" in refused(told, "shards", "index", where)
    assert "fine_label or coarse_label may be the label; say which with --label-column" in refused(
        told, "shards", "index", where, "--split", "train"
    )
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    options = ["--label-column", "fine_label", "--classes", tmp_path / "names.txt"]
    code, out, _ = told("shards", "index", where, "--split", "train", *options)
    assert code == 0 and "2: ant (12), bee (4)" in out and "image (img), label (fine_label)" in out
    assert told("shards", "index", where, "--split", "test", *options)[0] == 0
    assert "bee (8)" in told("shards", "inspect", where, "--split", "test")[1]
    assert "16 images, every checksum and every image is good" in told("shards", "verify", where, "--split", "train")[1]


def test_shards_without_a_manifest_are_described_and_verified(told, tmp_path):
    pq.write_table(tiny_table(0, 16), tmp_path / "a.parquet")
    code, out, _ = told("shards", "inspect", tmp_path)
    assert code == 0 and "0 (12), 1 (4)" in out
    assert "16 images, every image is good; no manifest, so no checksums" in told("shards", "verify", tmp_path)[1]
    assert not (tmp_path / "manifest.row_groups").exists()


def test_building_tells_what_it_leaves_out_and_asks_for_labels(told, tmp_path):
    (tmp_path / "src/val").mkdir(parents=True)
    for i in range(3):
        (tmp_path / f"src/val/ILSVRC2012_val_0000000{i}.JPEG").write_bytes(encode(tiny_pixels(i), "JPEG"))
    (tmp_path / "src/val/readme.txt").write_text("1")
    assert "3 images lie in `val` itself" in refused(told, "shards", "build", tmp_path / "src", tmp_path / "out")
    (tmp_path / "labels.txt").write_text("n02\nn01\nn02\n")
    code, out, err = told("shards", "build", tmp_path / "src", tmp_path / "out", "--labels", tmp_path / "labels.txt")
    assert code == 0 and "2: n01 (1), n02 (2)" in out and "left out: 1 .txt" in err


def tiny_pixels(number: int):
    return np.full((8, 8, 3), 20 * number, np.uint8)
