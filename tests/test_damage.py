"""Random damage to images, archives, shards, manifests and weights: nothing but the project's own errors comes out.

ROUNDS=2000 python -m pytest tests/test_damage.py     tries as many of each
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.damage import damaged, damaged_json, verdict
from support.images import encode, tiny_table
from support.manifests import OLDER, as_json
from support.models import SMALL, build

from unlearn import config
from unlearn.data import archives, duplicates, manifest, selection, shards
from unlearn.data.decode import decode
from unlearn.errors import DataError
from unlearn.models import weights

ROUNDS = int(os.environ.get("ROUNDS", 0))
pytestmark = [pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]


def images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (23, 37, 3), np.uint8)
    ramp, exif = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0), Image.Exif()
    exif[0x112] = 6
    plain = [encode(pixels, f) for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")]
    upright = [encode(pixels, f, exif=exif) for f in ("JPEG", "PNG", "WEBP", "AVIF")]
    deep = [encode(ramp), encode(ramp, "TIFF"), encode(ramp.astype(np.float32), "TIFF")]
    packed = [encode(pixels, "TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")]
    seen = [
        encode(pixels, mode="RGBA"),
        encode(pixels, mode="P", transparency=3),
        encode(pixels, "GIF", "P", transparency=1),
    ]
    return [
        *plain,
        *upright,
        *deep,
        *packed,
        *seen,
        encode(pixels, "JPEG", "CMYK"),
        encode(pixels, "JPEG", progressive=True),
    ]


def test_decode(capfd):
    rng, kinds = np.random.default_rng(0), images()
    counts = {"taken": 0, "ImageError": 0}
    for number in range(ROUNDS or 1000):
        data = damaged(kinds[number % len(kinds)], rng)
        counts[verdict(lambda data=data: decode(data))] += 1
    assert min(counts.values()) > sum(counts.values()) / 5, counts
    capfd.readouterr()  # libtiff writes to the terminal by itself


def packed(mode: str) -> bytes:
    """An archive of eight files, with links, a long name and a tar inside where it is a tar."""
    names, buffer = [f"train/c{i % 3}/{'x' * (150 if i == 4 else 3)}{i}.png" for i in range(8)], io.BytesIO()
    if mode.startswith("zip"):
        with zipfile.ZipFile(buffer, "w", {"zip": zipfile.ZIP_DEFLATED, "zip:lzma": zipfile.ZIP_LZMA}[mode]) as archive:
            for name in names:
                archive.writestr(name, name * 20)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, data in [*((n, tarfile.REGTYPE, n.encode() * 20) for n in names),
            ("train/c0/l.png", tarfile.SYMTYPE, b""),
                                 *([("n01.tar", tarfile.REGTYPE,
                                             packed("tar"))] if mode == "nested" else [])]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "xxx0.png" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_archives(tmp_path):
    rng, counts = np.random.default_rng(0), {"taken": 0, "DataError": 0}
    kinds = ["tar", "nested", "gzip", "lzma", "zip", "zip:lzma"]
    whole = {kind: packed(kind if "zip" in kind[:3] or kind == "nested" else "tar") for kind in kinds}
    compress = {"gzip": gzip.compress, "lzma": lzma.compress}

    def read() -> None:
        with archives.source(str(tmp_path / "a"), lambda name: name.endswith(".png")) as source:
            for name in source.names:
                source.read(name)

    for number in range(ROUNDS or 300):
        kind = kinds[number % len(kinds)]
        pack = compress.get(kind, bytes)
        outside = rng.random() < 0.4
        (tmp_path / "a").write_bytes(damaged(pack(whole[kind]), rng) if outside else pack(damaged(whole[kind], rng)))
        counts[verdict(read)] += 1
    assert min(counts.values()) > sum(counts.values()) / 5, counts


def stored(table: pa.Table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def parquets() -> list[bytes]:
    table = tiny_table(0, 16)
    other = pa.table(
        {"image": [row["bytes"] for row in table["image"].to_pylist()], "label": ["a", "b"] * 8, "id": list(range(16))}
    )
    return [
        stored(table, row_group_size=4, compression="none"), stored(other, row_group_size=8),
        stored(other, compression="zstd", write_page_checksum=True),
        stored(other, compression="gzip", data_page_version="2.0"),
    ]  # fmt: skip


def read_all(uri: str) -> None:
    known = shards.load(uri)
    known.table([column for column in known.columns if column != "image"])
    selection.select(known, config.Rows(classes=[0]), 0, "forget")
    duplicates.in_both((known, np.arange(4)), (known, np.arange(4, 9)))
    for group in range(len(known.groups)):
        list(shards.images(known.read(group, ["image"])))


def with_its_hash(data: bytes) -> bytes:
    """A manifest whose hash is that of its content, as a stranger would write it."""
    tree = json.loads(data)
    try:
        content = json.loads(data)
        for key in ("hash", "images"):
            content.pop(key, None)
        for shard in content["shards"]:
            for group in shard["row_groups"]:
                group.pop("checks", None)
        tree["hash"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except (TypeError, KeyError, AttributeError):
        pass
    return json.dumps(tree).encode()


def test_index(tmp_path):
    rng, whole = np.random.default_rng(0), []
    for data in parquets():
        (tmp_path / "a.parquet").write_bytes(data)
        shards.index(str(tmp_path))
        older = {OLDER: as_json(shards.load(str(tmp_path)))}
        whole.append({path.name: path.read_bytes() for path in tmp_path.iterdir()} | older)
    uri, counts = str(tmp_path), {}
    for number in range(ROUNDS or 160):
        files = whole[number % len(whole)]
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        name = ("a.parquet", "a.parquet", shards.MANIFEST, shards.MANIFEST, OLDER, "manifest.images")[number // 4 % 6]
        broken = with_its_hash(damaged_json(files[name], rng)) if name == OLDER else damaged(files[name], rng)
        (tmp_path / name).write_bytes(broken)
        if name == OLDER:
            (tmp_path / shards.MANIFEST).unlink()
        call = shards.index if number // 4 % 6 in (0, 2) else read_all
        told = verdict(lambda call=call: call(uri))
        counts[told] = counts.get(told, 0) + 1
    assert counts["taken"] > 10 and counts["DataError"] > 40, counts


def test_load(tmp_path):
    rng, files, counts = np.random.default_rng(0), [], {}
    for shape in ("mae", "diffusion_pixel", "diffusion_flux", "migan"):
        folder, model = tmp_path / shape, build(shape)
        weights.write(model, str(folder / "ours"), {})
        files += [(SMALL[shape][0], folder / "ours", path) for path in sorted((folder / "ours").iterdir())]
        if shape != "migan":  # which goes out as one file
            (folder / "theirs").mkdir()
            model.to_folder(folder / "theirs")
            files += [
                (SMALL[shape][0], folder / "theirs", p) for p in sorted((folder / "theirs").rglob("*")) if p.is_file()
            ]
        if shape == "mae":
            for name, zipped in (("new.pth", True), ("old.pth", False)):
                torch.save({"model": model.state_dict()}, tmp_path / name, _use_new_zipfile_serialization=zipped)
                files.append(("mae", tmp_path / name, tmp_path / name))
    for number in range(ROUNDS or 60):
        family, uri, path = files[number % len(files)]
        whole = path.read_bytes()
        broken = damaged_json(whole, rng) if path.suffix == ".json" and rng.random() < 0.7 else damaged(whole, rng)
        path.write_bytes(broken)
        options = SMALL["mae"][1] if path.suffix == ".pth" else {}
        wanted = config.Model(family=family, weights=str(uri), options=options)
        told = verdict(lambda wanted=wanted: weights.build(wanted))
        counts[told] = counts.get(told, 0) + 1
        path.write_bytes(whole)
    assert counts["taken"] and counts["WeightsError"] + counts["ConfigError"] > sum(counts.values()) / 3, counts


def test_a_shard_that_is_cut_short_while_it_is_read_is_one_error(tmp_path, monkeypatch):
    """Where it is mapped, the kernel ends the whole process."""
    path = tmp_path / "a.parquet"
    pq.write_table(tiny_table(0, 16), path, row_group_size=4)
    known, opened = shards.index(str(tmp_path)), manifest.parquet

    def cut(*arguments) -> pq.ParquetFile:
        file = opened(*arguments)
        os.truncate(path, 100)
        return file

    monkeypatch.setattr(manifest, "parquet", cut)
    with pytest.raises(DataError, match="a.parquet, row group 2: unreadable .*restore the shard"):
        known.read(2, ["image"])
