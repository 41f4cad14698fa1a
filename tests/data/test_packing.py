"""Packing a folder or a tar of CLASS/FILE into shards, here and on S3."""

import tarfile

import numpy as np
import pytest
from support.images import encode, tiny_table

from unlearn import config
from unlearn.data import packing, selection, shards
from unlearn.data.storage import Storage
from unlearn.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/zebra with 5 images, train/ant with 3, test/zebra with 2, and files that are no images."""
    root = tmp_path_factory.mktemp("images")
    rows = iter(tiny_table(0, 10)["image"].to_pylist())
    for path, count in (("train/zebra", 5), ("train/ant", 3), ("test/zebra", 2)):
        (root / path).mkdir(parents=True)
        for i in range(count):
            (root / path / f"{i}.{'JPG' if i % 2 else 'png'}").write_bytes(next(rows)["bytes"])
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "loose.png").write_bytes(b"no class")
    return root


@pytest.fixture(scope="module", params=["folder", "tar", "tar.gz"])
def source(request, folder, tmp_path_factory):
    """The same images as a folder, a tar, and a compressed tar in the folders' own order."""
    if request.param == "folder":
        return folder
    path = tmp_path_factory.mktemp("tars") / f"images.{request.param}"
    with tarfile.open(path, "w:gz" if request.param == "tar.gz" else "w") as tar:
        for child in sorted(folder.iterdir(), reverse=True):
            tar.add(child, child.name)
    return path


def test_images_are_packed_as_they_are_sorted_by_class(source, folder, place):
    seen = []
    manifest = packing.build(str(source), place, rows_per_group=4, shard_bytes=6000, progress=lambda *rows: seen.append(rows))
    names = ["train/ant/0.png", "train/ant/1.JPG", "train/ant/2.png", "test/zebra/0.png", "test/zebra/1.JPG",
             "train/zebra/0.png", "train/zebra/1.JPG", "train/zebra/2.png", "train/zebra/3.JPG", "train/zebra/4.png"]  # fmt: skip
    assert manifest == shards.load(place) and manifest.classes == ["ant", "zebra"]
    table = manifest.table(["id", "label"])
    assert table["id"].to_pylist() == names and table["label"].to_pylist() == [0] * 3 + [1] * 7
    found = [bytes(v) for g in range(len(manifest.groups)) for v in shards.images(manifest.read(g, ["image"]))]
    assert found == [(folder / n).read_bytes() for n in names]
    assert seen == [(4, 10), (8, 10), (10, 10)] and len(manifest.shards) > 1 and max(g.rows for s in manifest.shards for g in s.row_groups) == 4


def test_split_takes_one_folder_and_classes_can_be_selected(source, tmp_path):
    manifest = packing.build(str(source), str(tmp_path), split="test")
    assert manifest.table(["id"])["id"].to_pylist() == ["test/zebra/0.png", "test/zebra/1.JPG"] and manifest.classes == ["zebra"]
    assert len(selection.select(manifest, config.Rows(classes=["zebra"]), 0, "forget")) == 2


def test_the_same_images_pack_to_the_same_bytes(folder, source, tmp_path):
    first, second = (packing.build(str(s), str(tmp_path / name)) for s, name in ((folder, "a"), (source, "b")))
    assert first.hash == second.hash


def test_a_destination_that_holds_shards_is_refused_and_kept(folder, place):
    packing.build(str(folder), place)
    before = {n: Storage(place).read(n) for n in Storage(place).files()}
    with pytest.raises(DataError, match="holds shards already; give an empty folder"):
        packing.build(str(folder), place, split="train")
    assert {n: Storage(place).read(n) for n in Storage(place).files()} == before


def test_nothing_to_pack_is_told(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("not a tar file" * 100)
    for src, split, message in (
        (tmp_path / "empty", None, "no image in it laid out as CLASS/FILE"),
        (folder, "valid", "below a folder valid"),
        (tmp_path / "gone", None, "no such folder or tar file"),
        (tmp_path / "text.tar", None, "not a tar file"),
    ):
        with pytest.raises(DataError, match=message):
            packing.build(str(src), str(tmp_path / "out"), split=split)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_truncated_tar_is_told(folder, tmp_path, kind, share):
    path = tmp_path / f"cut.{kind}"
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
        tar.add(folder / "train", "train")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=f"cut.{kind}"):
        packing.build(str(path), str(tmp_path / "out"))


def test_records_with_subjects_keep_them(tmp_path):
    records = ({"image": encode(np.full((8, 8), i, np.uint8)), "label": i % 2, "id": f"r{i}", "subject": f"s{i}"} for i in range(5))
    manifest = packing.write(records, str(tmp_path), ["even", "odd"], rows_per_group=2)
    assert manifest.columns == ["image", "label", "id", "subject"]
    assert manifest.table(["subject"])["subject"].to_pylist() == [f"s{i}" for i in range(5)]

