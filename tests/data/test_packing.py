"""Packing a folder or a tar of CLASS/FILE into shards, here and on S3."""

import contextlib
import io
import os
import resource
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest
from support.images import encode, tiny_table

from unlearn import config
from unlearn.data import packing, selection, shards, sources
from unlearn.data.storage import Storage
from unlearn.errors import DataError, StorageError


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


@pytest.fixture(scope="module", params=["folder", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def source(request, folder, tmp_path_factory):
    """The same images as a folder, a tar, and a compressed tar in the folders' own order."""
    if request.param == "folder":
        return folder
    path = tmp_path_factory.mktemp("tars") / f"images.{request.param}"
    with tarfile.open(path, f"w:{request.param[4:]}") as tar:
        for child in sorted(folder.iterdir(), reverse=True):
            tar.add(child, child.name)
    return path


def test_images_are_packed_as_they_are_sorted_by_class(source, folder, place):
    seen = []
    manifest = packing.build(
        str(source), place, rows_per_group=4, shard_bytes=6000, progress=lambda *rows: seen.append(rows)
    )
    names = ["train/ant/0.png", "train/ant/1.JPG", "train/ant/2.png", "test/zebra/0.png", "test/zebra/1.JPG",
             "train/zebra/0.png", "train/zebra/1.JPG", "train/zebra/2.png", "train/zebra/3.JPG",
             "train/zebra/4.png"]  # fmt: skip
    assert manifest == shards.load(place) and manifest.classes == ["ant", "zebra"]
    table = manifest.table(["id", "label"])
    assert table["id"].to_pylist() == names and table["label"].to_pylist() == [0] * 3 + [1] * 7
    found = [bytes(v) for g in range(len(manifest.groups)) for v in shards.images(manifest.read(g, ["image"]))]
    assert found == [(folder / n).read_bytes() for n in names]
    assert (
        seen == [(4, 10), (8, 10), (10, 10)]
        and len(manifest.shards) > 1
        and max(g.rows for s in manifest.shards for g in s.row_groups) == 4
    )


def test_split_takes_one_folder_and_classes_can_be_selected(source, tmp_path):
    manifest = packing.build(str(source), str(tmp_path), split="test")
    assert manifest.table(["id"])["id"].to_pylist() == [
        "test/zebra/0.png",
        "test/zebra/1.JPG",
    ] and manifest.classes == ["zebra"]
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
        (tmp_path / "gone", None, "no such folder, tar or zip file"),
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


def test_a_tar_cut_within_a_header_is_told(folder, tmp_path):
    """tarfile takes what is left of it for the end."""
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "train", "train")
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[: last + 100])
    with pytest.raises(DataError, match="cut.tar: not whole: it is cut short within the header of a file"):
        packing.build(str(path), str(tmp_path / "out"))


def test_records_with_subjects_keep_them(tmp_path):
    records = (
        {"image": encode(np.full((8, 8), i, np.uint8)), "label": i % 2, "id": f"r{i}", "subject": f"s{i}"}
        for i in range(5)
    )
    manifest = packing.write(records, str(tmp_path), ["even", "odd"], rows_per_group=2)
    assert manifest.columns == ["image", "label", "id", "subject"]
    assert manifest.table(["subject"])["subject"].to_pylist() == [f"s{i}" for i in range(5)]


def tar_of(path, members: Iterable[tuple[str, bytes]], mode: str = "w"):
    """A tar of these (name, content) in this order."""
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def contents(manifest: shards.Manifest) -> list[bytes]:
    return [bytes(v) for g in range(len(manifest.groups)) for v in shards.images(manifest.read(g, ["image"]))]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_read_in_one_pass(tmp_path, monkeypatch, mode):
    names = [f"{i % 7}/{i}.png" for i in range(500)]
    path, passed = tar_of(tmp_path / "a.tar", ((n, n.encode()) for n in names), mode), []
    step = tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: passed.append(step(self)) or passed[-1])
    manifest = packing.build(str(path), str(tmp_path / "out"))
    # Each opening looks at the first header, and the end is met once; a search by name would pass over all again.
    assert len([m for m in passed if m]) <= len(names) + 4
    order = sorted(names, key=lambda n: (n.split("/")[0], n))
    assert manifest.table(["id"])["id"].to_pylist() == order and contents(manifest) == [n.encode() for n in order]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_memory_holds_a_row_group_and_not_a_shard(tmp_path, place, mode):
    count, size, seen = 160, 100_000, []
    path = tar_of(tmp_path / "a.tar", ((f"{i % 3}/{i}.png", os.urandom(size)) for i in range(count)), mode)

    def measure(*_) -> None:
        seen.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes())

    packing.build(str(path), f"{place}/warm-up", rows_per_group=160)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        packing.build(str(path), f"{place}/measured", rows_per_group=8, progress=measure)
    finally:
        tracemalloc.stop()
    assert max(seen) - before < count * size / 3, max(seen) - before


def test_what_was_uploaded_is_not_downloaded(s3, proxied, folder):
    manifest = packing.build(str(folder), s3, rows_per_group=4, shard_bytes=6000)
    asked = [(method, path) for method, path in proxied.requests if ".parquet" in path]
    assert len(asked) == len(manifest.shards) > 1 and {method for method, _ in asked} == {"PUT"}
    assert manifest == shards.load(s3) and manifest.shards == shards.index(s3).shards


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "nested"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_last_of_several_members_of_one_name_counts(tmp_path, kind):
    members, path = [("c/0.png", b"old"), ("c/1.png", b"one"), ("c/0.png", b"newer")], tmp_path / "a"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
    elif kind == "nested":  # in a folder, beside files that are overlaid
        (path / "c").mkdir(parents=True)
        (path / "c" / "0.png").write_bytes(b"older")
        tar_of(path / "c.tar", [(name[2:], data) for name, data in members])
    else:
        tar_of(path, members, kind)
    manifest = packing.build(str(path), str(tmp_path / "out"), layout="imagenet")
    assert manifest.table(["id"])["id"].to_pylist() == ["c/0.png", "c/1.png"]
    assert contents(manifest) == [b"newer", b"one"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_member_and_links_of_one_name_are_one(tmp_path, mode):
    """tar stores a file that it is given twice as a link to itself."""
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        for name, data in (("c/0.png", b"old"), ("c/0.png", "c/0.png"), ("c/1.png", "c/0.png"), ("c/1.png", b"one")):
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.LNKTYPE, data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    manifest = packing.build(str(tmp_path / "a.tar"), str(tmp_path / "out"))
    assert manifest.table(["id"])["id"].to_pylist() == ["c/0.png", "c/1.png"]
    assert contents(manifest) == [b"old", b"one"]


def test_members_stored_with_holes_are_refused(tmp_path):
    if not shutil.which("tar"):
        pytest.skip("tar is not installed")
    (tmp_path / "c").mkdir()
    with open(tmp_path / "c" / "0.png", "wb") as file:
        file.write(b"start")
        file.truncate(8 << 30)
    for form in ("--format=gnu", *(f"--format=posix --sparse-version={v}" for v in ("0.0", "0.1", "1.0"))):
        for name, packed in (("a.tar", []), ("a.tar.gz", ["-z"])):
            subprocess.run(["tar", *form.split(), *packed, "--sparse", "-cf", name, "c"], cwd=tmp_path, check=True)
            assert (tmp_path / name).stat().st_size < 20_000
            with pytest.raises(DataError, match=f"{name}: c/.*0.png is stored with holes .sparse.*without --sparse"):
                packing.build(str(tmp_path / name), str(tmp_path / "out"))


def test_a_small_archive_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALL", 1 << 20)
    huge = tarfile.TarInfo("c/0.png")
    huge.pax_headers = {"comment": "x" * (2 << 20)}
    with tarfile.open(tmp_path / "header.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(huge)
    images = [(f"c/{i}.png", bytes(100_000)) for i in range(90)]
    for kind in ("gz", "bz2", "xz"):
        tar_of(tmp_path / f"bomb.tar.{kind}", images, f"w:{kind}")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in images:
            archive.writestr(name, data)
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="has a header of 2,097|unpacks to more than .*100 times its size"):
            packing.build(str(path), str(tmp_path / "out"))


def test_a_zip_whose_index_lies_is_told_before_it_fills_the_memory(tmp_path):
    whole, told = 32 << 20, 50
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
            archive.writestr("c/0.png", bytes(whole))
        data = (tmp_path / "a.zip").read_bytes()
        (tmp_path / "a.zip").write_bytes(data.replace(whole.to_bytes(4, "little"), told.to_bytes(4, "little")))
        del data
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match="a.zip: c/0.png: cannot be unpacked"):
                packing.build(str(tmp_path / "a.zip"), str(tmp_path / "out"))
            assert tracemalloc.get_traced_memory()[1] < whole / 2 or method == zipfile.ZIP_LZMA
        finally:
            tracemalloc.stop()


def test_a_header_that_leads_back_is_told(tmp_path):
    member = tarfile.TarInfo("c/0.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    pax = tarfile.TarInfo("c/0.png")
    pax.pax_headers = {"size": "-1024"}
    for content in (bytes(header), pax.tobuf(tarfile.PAX_FORMAT)):
        (tmp_path / "a.tar").write_bytes(content + bytes(10_240))
        with pytest.raises(DataError, match="a.tar: c/0.png has a negative size"):
            packing.build(str(tmp_path / "a.tar"), str(tmp_path / "out"))


def test_a_row_group_of_large_images_is_a_small_one(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_BYTES", 2500)
    records = ({"image": bytes(1000), "label": 0, "id": f"{i}"} for i in range(7))
    assert [g.rows for g in packing.write(records, str(tmp_path), ["c"]).shards[0].row_groups] == [3, 3, 1]


def test_a_compressed_tar_with_a_wrong_checksum_is_told(tmp_path):
    path = tar_of(tmp_path / "a.tar.gz", [(f"c/{i}.png", os.urandom(1000)) for i in range(50)], "w:gz")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.tar.gz: not a tar file, or cut short .CRC"):
        packing.build(str(path), str(tmp_path / "out"))


def test_a_tar_that_shrinks_meanwhile_is_told(tmp_path):
    path = tar_of(tmp_path / "a.tar", [(f"c/{i}.png", bytes(10_000)) for i in range(50)])
    with pytest.raises(DataError, match="a.tar: .*c/.*.png is not there whole"):
        packing.build(
            str(path), str(tmp_path / "out"), rows_per_group=10, progress=lambda *_: os.truncate(path, 200_000)
        )


@contextlib.contextmanager
def small_disk(size: int):
    """No file may grow larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room_is_told_by_its_place_and_leaves_nothing(tmp_path):
    members = [(f"c/{i}.png", os.urandom(10_000)) for i in range(50)]
    plain, packed = tar_of(tmp_path / "a.tar", members), tar_of(tmp_path / "a.tar.gz", members, "w:gz")
    with small_disk(100_000):
        with pytest.raises(StorageError, match=f"{tmp_path}/out/shard-00000.parquet: .*File too large"):
            packing.build(str(plain), str(tmp_path / "out"))
        with pytest.raises(StorageError, match="^/[^ ]*: File too large"):
            packing.build(str(packed), str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


def test_an_image_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "in" / "c").mkdir(parents=True)
    images = [tmp_path / "in" / "c" / f"{i}.png" for i in range(3)]
    for image in images:
        image.write_bytes(b"1")
    with pytest.raises(StorageError, match="in/c/2.png: there is no such file"):
        packing.build(
            str(tmp_path / "in"),
            str(tmp_path / "out"),
            rows_per_group=1,
            progress=lambda *_: images[2].unlink(missing_ok=True),
        )


@pytest.mark.parametrize("kind", ["zip", "", "z", "nested"])
def test_absolute_names_are_those_below_the_root(tmp_path, kind):
    """As tar takes them: of an archive that was made with -P as of one without."""
    if not shutil.which("tar"):
        pytest.skip("tar is not installed")
    root, ids = tmp_path / "in", []
    (root / "c").mkdir(parents=True)
    (root / "c" / "0.png").write_bytes(b"zero")
    os.link(root / "c" / "0.png", root / "c" / "1.png")
    os.symlink(root / "c" / "0.png", root / "c" / "2.png")
    for keep in ("", "P"):
        path = tmp_path / f"a{keep}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for n in range(3):
                    member = zipfile.ZipInfo(f"{'/' if keep else ''}{root}/c/{n}.png".removeprefix("" if keep else "/"))
                    archive.writestr(member, b"zero")
        else:
            flags = f"-c{keep}{kind.replace('nested', '')}f"
            subprocess.run(["tar", flags, str(path), str(root)], check=True, stderr=subprocess.DEVNULL)
            if kind == "nested":
                tar_of(tmp_path / "outer", [(f"{'/' if keep else ''}t.tar", path.read_bytes())])
                path = tmp_path / "outer"
        manifest = packing.build(str(path), str(tmp_path / f"out{keep}"))
        ids.append(manifest.table(["id"])["id"].to_pylist())
        assert set(contents(manifest)) == {b"zero"}
    folder = "t" * (kind == "nested") + str(root)[kind != "nested" :]
    assert ids[0] == ids[1] == [f"{folder}/c/{n}.png" for n in range(1 if kind == "nested" else 3)]


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "nested"])
def test_members_that_lead_out_of_the_archive_are_left_out_and_told(tmp_path, caplog, kind):
    """Else `..` is a class."""
    outside = ["../evil.png", "ant/../../x/evil.png", "/../abs/evil.png"]
    members, path = [(name, name.encode()) for name in ["ant/1.png", "bee/2.png", *outside]], tmp_path / "a"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
    elif kind == "nested":  # a tar for each class, in a tar
        inner = tar_of(tmp_path / "inner", members).read_bytes()
        tar_of(path, [("n01.tar", inner), ("../n02.tar", inner)])
    else:
        tar_of(path, members, kind)
    manifest = packing.build(str(path), str(tmp_path / "out"))
    assert sorted(contents(manifest)) == [b"ant/1.png", b"bee/2.png"] and ".." not in manifest.classes
    told = 4 if kind == "nested" else 3  # the second tar counts once
    assert f"left out: {told} name(s) that lead out of it: absolute, or with `..`" in caplog.text
    tar_of(path, members[2:])
    with pytest.raises(DataError, match=r"no image in it laid out as CLASS/FILE; left out: 3 name\(s\) that lead out"):
        packing.build(str(path), str(tmp_path / "none"))
