"""Image data sets as they are published: every class is its own, and what has no class is told."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.images import encode

from unlearn.data import packing, shards, tars
from unlearn.data.storage import Storage
from unlearn.errors import DataError, StorageError


def image(number: int) -> bytes:
    return encode(np.full((4, 4, 3), number % 256, np.uint8))


def tree(root: Path, *names: str, content: dict[str, bytes] | None = None) -> str:
    """A folder of these images; content: of other files."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(i))
    for name, data in (content or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def tarred(path: Path, members: dict[str, bytes | str], mode: str = "w", hard: bool = False) -> str:
    """A tar of these files; text is where a link leads to."""
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = (tarfile.LNKTYPE if hard else tarfile.SYMTYPE), data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def packed(tmp_path, src: str, **options) -> dict[str, str | int]:
    """{id: class, or label where it has no name} of what was packed."""
    place = tmp_path / f"out-{len(os.listdir(tmp_path))}"
    manifest = packing.build(src, str(place), **options)
    table = manifest.table(["id", "label"])
    found = [manifest.classes[label] if manifest.classes else label for label in table["label"].to_pylist()]
    return dict(zip(table["id"].to_pylist(), found, strict=True))


@pytest.mark.parametrize(
    "names, classes",
    [
        (["d/a/abbey/1.jpg", "d/a/alley/1.jpg", "d/c/church/outdoor/1.jpg", "d/a/apartment/outdoor/1.jpg"],
         ["a/abbey", "a/alley", "c/church/outdoor", "a/apartment/outdoor"]),
        (["train/a/abbey/1.jpg", "train/b/bank/1.jpg", "val/a/abbey/2.jpg"], ["a/abbey", "b/bank", "a/abbey"]),
        (["a/abbey/1.jpg", "a/alley/1.jpg"], ["a/abbey", "a/alley"]),
        (["pets/young/1.jpg", "cars/young/1.jpg", "pets/old/1.jpg"], ["pets/young", "cars/young", "pets/old"]),
        (["x/train/cat/1.jpg", "x/train/dog/1.jpg", "x/val/cat/1.jpg"], ["cat", "dog", "cat"]),
        (["animals/cat/1.jpg", "things/car/1.jpg"], ["cat", "car"]),
        (["part1/n01440764/1.JPEG", "part2/n01440764/2.JPEG", "part2/n01443537/2.JPEG"],
            ["n01440764", "n01440764", "n01443537"]),
        (["train/n01440764/images/1.JPEG", "train/n01443537/images/1.JPEG"], ["n01440764", "n01443537"]),
        (["bus/1.jpg", "train/1.jpg"], ["bus", "train"]),
        (["train/bus/1.jpg", "train/train/1.jpg"], ["bus", "train"]),
        (["celeba/img_align/1.jpg", "celeba/img_align/2.jpg"], ["img_align", "img_align"]),
    ],
)  # fmt: skip
def test_the_class_is_guessed_from_folders(tmp_path, names, classes):
    assert packed(tmp_path, tree(tmp_path / "in", *names)) == dict(zip(names, classes, strict=True))


def test_a_layout_that_is_named_is_taken(tmp_path):
    src = tree(tmp_path / "in", "x/p/young/1.jpg", "x/q/old/1.jpg")
    assert set(packed(tmp_path, src).values()) == {"young", "old"}
    assert set(packed(tmp_path, src, layout="places365").values()) == {"p/young", "q/old"}
    same = tree(tmp_path / "same", "x/p/young/1.jpg", "x/q/young/1.jpg")
    assert set(packed(tmp_path, same, layout="imagenet").values()) == {"young"}


@pytest.mark.parametrize(
    "names, options",
    [
        (["val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG"], {}),
        (["train2017/000000000009.jpg"], {}),
        (["val_256/Places365_val_00000001.jpg"], {}),
        (["any/Places365_val_00000001.jpg"], {}),
        (["ILSVRC2012_val_00000001.JPEG"], {}),
        (["train/n01440764/1.JPEG", "val/1.JPEG", "test/2.JPEG"], {}),
        (["train/n01440764/1.JPEG", "val/1.JPEG"], {"split": "val"}),
        (["train/n01440764/images/1.JPEG", "train/n01443537/images/1.JPEG", "val/images/1.JPEG"], {"split": "val"}),
    ],
)
def test_flat_folders_are_never_a_class(tmp_path, names, options):
    src = tree(tmp_path / "in", *names)
    with pytest.raises(
        DataError, match="images lie in .*, not in folders of classes: give their labels with --labels FILE"
    ):
        packed(tmp_path, src, **options)


@pytest.mark.parametrize(
    "text, classes, labels",
    [
        ("7\n3\n7\n", None, [7, 3, 7]),
        ("\ufeffv_1.JPEG 7\nv_2.JPEG 3\nv_3.JPEG 7\n", None, [7, 3, 7]),
        ("n01443537\nn01440764\nn01443537\n", None, ["n01443537", "n01440764", "n01443537"]),
        ("v_3.JPEG 0\nv_1.JPEG 1\nv_2.JPEG 0\n", ["ant", "bee"], ["bee", "ant", "ant"]),
        ("/val/v_1.JPEG 5\n/val/v_2.JPEG 5\n/val/v_3.JPEG 6\nv_4.JPEG 6\n", None, [5, 5, 6]),
        (
            "ImageId,PredictionString\nv_2,n02 1 2 3 4\nv_1,n01 1 2 3 4 n01 5 6 7 8\nv_3,n02 1 1 1 1\n",
            None,
            ["n01", "n02", "n02"],
        ),
        ("v_1.JPEG\tn01\t0\t32\nv_2.JPEG\tn02\t0\t32\nv_3.JPEG\tn01\t0\t32\n", ["n02", "n01"], ["n01", "n02", "n01"]),
    ],
)
def test_flat_folders_take_their_labels_from_a_list(tmp_path, text, classes, labels):
    (tmp_path / "labels.txt").write_text(text)
    names = [f"val/v_{i}.JPEG" for i in (1, 2, 3)]
    found = packed(tmp_path, tree(tmp_path / "in", *names), labels=str(tmp_path / "labels.txt"), classes=classes)
    assert found == dict(zip(names, labels, strict=True))
    assert (
        packed(tmp_path, str(tmp_path / "in"), labels=str(tmp_path / "labels.txt"), classes=classes, split="val")
        == found
    )


@pytest.mark.parametrize(
    "text, classes, message",
    [
        ("1\n2\n", None, "labels.txt: 2 labels for 3 images"),
        ("-1\n-1\n-1\n", None, "label -1: labels are whole numbers from 0"),
        ("9" * 30 + "\n1\n2\n", None, "label 9+: labels are whole numbers from 0"),
        ("a.jpg 1\na.jpg 2\nb.jpg 2\nc.jpg 3\n", None, "gives a.jpg the labels 1 and 2"),
        ("a.jpg 1\nb.jpg 2\nx.jpg 3", None, "1 of 3 images are not in this list, for example val/c.jpg"),
        ("1\n2\n3\n", ["x", "y"], "label 3, and there are 2 class names"),
        ("x\ny\nz\n", ["x", "y"], "class 'z' is not among the given class names"),
        (None, None, "labels.txt: cannot be read as a list of labels"),
    ],
)  # fmt: skip
def test_a_list_that_does_not_fit_is_told(tmp_path, text, classes, message):
    if text:
        (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        packed(
            tmp_path,
            tree(tmp_path / "in", "val/a.jpg", "val/b.jpg", "val/c.jpg"),
            labels=str(tmp_path / "labels.txt"),
            classes=classes,
        )


def test_what_is_no_data_is_ignored_and_what_cannot_be_read_is_told(tmp_path, caplog):
    src = tree(tmp_path / "in", "cat/1.jpg", "cat/2.GIF", "cat/3.tif", "cat/4.jfif", "cat/5.jpe", "cat/6.tiff",
        ".ipynb_checkpoints/1.jpg", "__MACOSX/cat/1.jpg",
               "_temporary/0/cat/1.jpg", "cat/.hidden/1.jpg", "cat/._1.jpg", "loose.png", "cat/7.heic", "cat/8.heic",
               "cat/notes.txt")  # fmt: skip
    assert packed(tmp_path, src) == {
        f"cat/{n}": "cat" for n in ("1.jpg", "2.GIF", "3.tif", "4.jfif", "5.jpe", "6.tiff")
    }
    assert "left out: 2 .heic, 1 .txt, 1 image(s) without a class folder" in caplog.text


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path):
    src = tree(tmp_path / "in", "dog/1.jpg")
    tree(tmp_path / "elsewhere", "cat/1.jpg", "cat/2.jpg")
    os.symlink(tmp_path / "elsewhere/cat", tmp_path / "in/cat")
    os.symlink(tmp_path / "in", tmp_path / "in/dog/up")
    os.symlink(tmp_path / "in/dog", tmp_path / "in/dog/self")
    os.symlink(tmp_path / "gone", tmp_path / "in/gone")
    os.symlink(tmp_path / "elsewhere/cat/2.jpg", tmp_path / "in/dog/3.jpg")
    assert packed(tmp_path, src) == {"cat/1.jpg": "cat", "cat/2.jpg": "cat", "dog/1.jpg": "dog", "dog/3.jpg": "dog"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_inside_a_tar_are_resolved(tmp_path, mode, caplog):
    members = {"a/1.png": image(1), "a/2.png": "1.png", "b/3.png": "../store/x.png", "c": "store/deep",
        "b/4.png": "nowhere.png", "b/5.png": "6.png", "b/6.png": "5.png",
               "store/x.png": image(2), "store/deep/y.png": image(3), "d/7.png": "../a/2.png"}  # fmt: skip
    src = tarred(tmp_path / "a.tar", members, mode)
    found = packed(tmp_path, src)
    assert found == {
        "a/1.png": "a",
        "a/2.png": "a",
        "b/3.png": "b",
        "c/y.png": "c",
        "store/x.png": "store",
        "store/deep/y.png": "deep",
        "d/7.png": "d",
    }
    assert "3 links that lead nowhere" in caplog.text
    manifest = packing.build(
        tarred(tmp_path / "b.tar", {"train/c/1.png": image(7), "val/c/2.png": "train/c/1.png"}, mode, hard=True),
        str(tmp_path / "b"),
        split="val",
    )
    assert manifest.rows == 1 and bytes(next(shards.images(manifest.read(0, ["image"])))) == image(7)


def test_many_links_are_not_each_compared_with_every_file(tmp_path):
    class Name(str):
        def startswith(self, *prefix) -> bool:
            pytest.fail("a file is looked at for a link")

    scan = tars._Scan(tmp_path, lambda name: "/" in name)
    scan.others = {Name(name): (0, 1) for name in ("a/1", "a/2/3", "a-b/4", "a0", "a.png", "b/1")}
    scan.links = {"link": "a", "to": "a-b", "x/none": "a/9"}
    scan.resolve()
    assert set(scan.places) == {"link/1", "link/2/3", "to/4"} and scan.left_out["links that lead nowhere"] == 1


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_of_tars_is_a_folder_for_each(tmp_path, mode):
    for synset in ("n02", "n01"):
        tarred(tmp_path / f"{synset}.tar", {f"{synset}_{i}.JPEG": image(i + ord(synset[2])) for i in range(3)})
    inner = {f"{s}.tar": (tmp_path / f"{s}.tar").read_bytes() for s in ("n02", "n01")}
    manifest = packing.build(tarred(tmp_path / "ILSVRC2012_img_train.tar", inner, mode), str(tmp_path / "out"))
    assert manifest.classes == ["n01", "n02"] and manifest.table(["id"])["id"].to_pylist() == [
        f"{s}/{s}_{i}.JPEG" for s in ("n01", "n02") for i in range(3)
    ]
    assert [bytes(v) for v in shards.images(manifest.read(0, ["image"]))] == [
        image(i + ord(s)) for s in "12" for i in range(3)
    ]
    tree(tmp_path / "folder", content={f"train/{name}": data for name, data in inner.items()})
    assert set(packed(tmp_path, str(tmp_path / "folder")).values()) == {"n01", "n02"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_inside_a_tar_ends_where_it_does(tmp_path, mode):
    """Else the members that follow are its own, or fill its last one."""
    tarred(tmp_path / "in.tar", {"1.png": image(1), "2.png": image(2) * 9})
    with tarfile.open(tmp_path / "in.tar") as tar:
        *_, last = tar.getmembers()
    whole, beside = (tmp_path / "in.tar").read_bytes(), {"d/9.png": image(9) * 50, "._c.tar": b"no tar"}
    assert last.size > 512
    src = tarred(tmp_path / "a.tar", {"c.tar": whole[: last.offset], "b.tar": whole, **beside}, mode)
    assert packed(tmp_path, src) == {"c/1.png": "c", "b/1.png": "b", "b/2.png": "b", "d/9.png": "d"}
    for cut in (0, last.offset + 100, last.offset_data, last.offset_data + 512):
        src = tarred(tmp_path / "a.tar", {"c.tar": whole[:cut], **beside}, mode)
        with pytest.raises(DataError, match=r"a.tar/c.tar: not .*cut short"):
            packed(tmp_path, src)


def test_a_webdataset_has_its_labels_beside_the_images(tmp_path):
    members = {}
    for i, label in enumerate((2, 0, 2)):
        members |= {f"{i:06d}.jpg": image(i), f"{i:06d}.cls": str(label).encode(), f"{i:06d}.json": b'{"label": 9}'}
    src = tarred(tmp_path / "000.tar", members)
    assert packed(tmp_path, src) == {"000000.jpg": 2, "000001.jpg": 0, "000002.jpg": 2}
    assert packed(tmp_path, src, classes=["ant", "bee", "cat"])["000000.jpg"] == "cat"
    (tmp_path / "many").mkdir()
    for n in "01":
        tarred(tmp_path / f"many/{n}.tar", {"k.jpg": image(int(n)), "k.json": f'{{"cls": "c{n}"}}'.encode()})
    assert packed(tmp_path, str(tmp_path / "many"), layout="webdataset") == {"0/k.jpg": "c0", "1/k.jpg": "c1"}
    for data, message in (
        (b"{}", "k.jpg has no label beside it"),
        (b"[", "k.json holds no label that can be read"),
        (b"[1]", "holds no label"),
    ):
        with pytest.raises(DataError, match=message):
            packed(tmp_path, tarred(tmp_path / "bad.tar", {"k.jpg": image(1), "k.json": data}), layout="webdataset")


def test_a_zip_and_a_damaged_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("x/cat/1.png", "x/dog/1.png", "__MACOSX/x/cat/1.png"):
            archive.writestr(name, image(len(name)))
    assert packed(tmp_path, str(tmp_path / "a.zip")) == {"x/cat/1.png": "cat", "x/dog/1.png": "dog"}
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(image(11)) + 20] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match="a.zip: x/cat/1.png: cannot be unpacked .*CRC"):
        packed(tmp_path, str(tmp_path / "a.zip"))


def test_sources_on_s3(s3, tmp_path):
    for name in ("in/train/cat/1.png", "in/train/dog/1.png"):
        Storage(s3).write(name, image(len(name)))
    assert packed(tmp_path, f"{s3}/in") == {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}
    Storage(s3).write("a.tar", Path(tarred(tmp_path / "a.tar", {"cat/1.png": image(1)})).read_bytes())
    assert packed(tmp_path, f"{s3}/a.tar") == {"cat/1.png": "cat"}


def test_tars_below_a_prefix_of_s3_are_read_as_in_a_folder(s3, tmp_path):
    for n in (1, 2):
        members = {f"n0{n}_{i}.JPEG": image(10 * n + i) for i in range(3)}
        tarred(tmp_path / "in.tar", members)
        Storage(s3).write(f"in/train/n0{n}.tar", (tmp_path / "in.tar").read_bytes())
        tree(tmp_path / "in", content={f"train/n0{n}.tar": (tmp_path / "in.tar").read_bytes()})
    assert packed(tmp_path, f"{s3}/in") == packed(tmp_path, f"{tmp_path}/in") != {}
    manifest = packing.build(f"{s3}/in", str(tmp_path / "out"))
    assert [bytes(v) for v in shards.images(manifest.read(0, ["image"]))] == [
        image(n) for n in (10, 11, 12, 20, 21, 22)
    ]
    with packing.opened(f"{s3}/in", None, None) as source:
        Storage(s3).write("in/train/n01.tar", b"another")
        with pytest.raises(StorageError, match="in/train/n01.tar: .*replaced"):
            source.read("train/n01/n01_0.JPEG")
    with pytest.raises(DataError, match=f"{s3}/in/train/n01.tar: not a tar file, or cut short"):
        packed(tmp_path, f"{s3}/in")
    for src in (f"{s3}/in", f"{tmp_path}/in"):  # beside images only if the layout has tars
        Storage(src).write("train/n02/loose.png", image(7))
        Storage(src).delete("train/n01.tar")
        assert set(packed(tmp_path, src)) == {"train/n02/loose.png"}
        assert len(packed(tmp_path, src, layout="imagenet")) == 4


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_name_that_is_not_utf8_is_told_before_anything_is_written(tmp_path, kind):
    src = tree(tmp_path / "in", "cat/1.png")
    os.rename(tmp_path / "in/cat/1.png", os.fsencode(tmp_path / "in/cat") + b"/caf\xe9.png")
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(src, "in")
        src = str(tmp_path / "a.tar")
    with pytest.raises(
        DataError, match=r"the names of 1 file\(s\) are not UTF-8, for example .*cat/caf\?.png; rename them"
    ):
        packing.build(src, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
