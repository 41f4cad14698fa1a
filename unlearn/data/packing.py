"""Pack images into shards: from a folder or a tar of `.../CLASS/FILE` (ImageNet, Places style), or from any records."""

import bz2
import contextlib
import gzip
import itertools
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.data import shards
from unlearn.data.classes import ordered
from unlearn.data.columns import with_class_names
from unlearn.data.storage import Storage, told
from unlearn.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"]\0\0": lzma.open}  # what a compressed tar begins with
Record = dict  # image: bytes, label: int, id: str, optional subject: str
Source = tuple[list[str], Callable[[str], bytes]]  # names of images, what reads one


def build(
    src: str, dest: str, split: str | None = None, rows_per_group: int = 256, shard_bytes: int = 256 << 20,
    progress: Callable[[int, int], None] = lambda rows, total: None,
) -> shards.Manifest:  # fmt: skip
    """Pack `src` into shards at `dest` and write their manifest. The encoded images are kept as they are.

    split: take only what lies in a folder of that name (`train` of `train/CLASS/FILE`). An image's id is its path.
    Raises DataError where there is nothing to pack, or `dest` holds shards already.
    """
    path = Path(src)
    if not path.exists():
        raise DataError(f"{src}: no such folder or tar file")

    def wanted(name: str) -> bool:
        return _is_image(name) and (split is None or split in name.split("/")[:-2])

    with (_folder if path.is_dir() else _tar)(path, wanted) as (names, read):
        if not names:
            raise DataError(f"{src}: no image in it laid out as CLASS/FILE" + (f" below a folder {split}" if split else ""))
        classes = ordered({_class(n) for n in names})
        labels = {c: i for i, c in enumerate(classes)}
        # Sorted by class, so that a row group holds few labels and a selection reads few row groups.
        names.sort(key=lambda n: (labels[_class(n)], n))
        records = ({"image": read(n), "label": labels[_class(n)], "id": n} for n in names)
        return write(records, dest, classes, rows_per_group, shard_bytes, lambda rows: progress(rows, len(names)))


def write(
    records: Iterable[Record], dest: str, classes: list[str], rows_per_group: int = 256, shard_bytes: int = 256 << 20,
    progress: Callable[[int], None] = lambda rows: None,
) -> shards.Manifest:  # fmt: skip
    """Write records as shards of about `shard_bytes`, and their manifest last. One row group is in memory at a time."""
    storage = Storage(dest)
    if any(n.endswith(".parquet") or n == shards.MANIFEST for n in storage.files()):
        raise DataError(f"{dest}: holds shards already; give an empty folder")
    groups, described, written = _groups(records, rows_per_group, classes), [], 0
    for first in groups:
        name, size = f"shard-{len(described):05d}.parquet", 0
        with storage.writing(name) as path:
            with _writer(path, first.schema, storage.where(name)) as write_group:
                for group in itertools.chain([first], groups):
                    write_group(group)
                    size, written = size + group.nbytes, written + group.num_rows
                    progress(written)
                    if size >= shard_bytes:
                        break
            described.append(shards.describe(path, name, storage.where(name)))
    return shards.save(*shards.collect(storage.uri, described, classes))


def _groups(records: Iterable[Record], rows: int, classes: list[str]) -> Iterator[pa.Table]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == rows:
            yield _table(batch, classes)
            batch = []
    if batch:
        yield _table(batch, classes)


def _table(batch: list[Record], classes: list[str]) -> pa.Table:
    columns = {
        "image": [{"bytes": r["image"], "path": r["id"]} for r in batch],
        "label": [r["label"] for r in batch],
        "id": [r["id"] for r in batch],
    }
    if "subject" in batch[0]:
        columns["subject"] = [r["subject"] for r in batch]
    schema = pa.schema([shards.SCHEMA.field(name) for name in columns])
    return pa.table(columns, with_class_names(schema, classes))


@contextlib.contextmanager
def _writer(path: Path, schema: pa.Schema, where: str) -> Iterator[Callable[[pa.Table], None]]:
    """A function that appends a row group to a new Parquet file. Raises StorageError that names `where`."""

    def write_group(group: pa.Table) -> None:
        with told(where):
            writer.write_table(group, row_group_size=group.num_rows)

    with told(where):
        # Encoded images do not compress further.
        writer = pq.ParquetWriter(path, schema, compression="none", write_page_index=True)
    try:
        yield write_group
    finally:
        with told(where):
            writer.close()


def _class(name: str) -> str:
    return PurePosixPath(name).parent.name


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and PurePosixPath(name).parent.name != ""


@contextlib.contextmanager
def _folder(path: Path, wanted: Callable[[str], bool]) -> Iterator[Source]:
    def read(name: str) -> bytes:
        with told(f"{path}/{name}"):
            return (path / name).read_bytes()

    yield sorted(n for p in path.rglob("*") if p.is_file() and wanted(n := p.relative_to(path).as_posix())), read


@contextlib.contextmanager
def _tar(path: Path, wanted: Callable[[str], bool]) -> Iterator[Source]:
    """The members of a tar, read by their place in the file: tarfile looks a name up among all members each time."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        with _told_as_tar(path):
            if _is_plain(path):
                tar = stack.enter_context(tarfile.open(path, "r:"))
                file = stack.enter_context(open(path, "rb"))
                # The few members that are stored with holes are left to tarfile.
                found = [(m.name, m if m.issparse() else (m.offset_data, m.size)) for m in _members(tar, wanted)]
            else:
                found = list(_unpacked(path, wanted, file))
        places = dict(found)  # of several members of one name the last counts

        def read(name: str) -> bytes:
            place = places[name]
            with _told_as_tar(path):
                if isinstance(place, tarfile.TarInfo):
                    return tar.extractfile(place).read()
                if len(data := os.pread(file.fileno(), place[1], place[0])) != place[1]:
                    raise EOFError(f"{name} is not there whole")
                return data

        yield sorted(name for name, _ in found), read


def _is_plain(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
        return True
    except tarfile.ReadError:
        if _decompressor(path) is None:
            raise
        return False


def _decompressor(path: Path) -> Callable | None:
    with open(path, "rb") as file:
        start = file.read(6)
    return next((open_ for magic, open_ in COMPRESSED.items() if start.startswith(magic)), None)


def _members(tar: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # it would keep every one of them
        if member.isfile() and wanted(member.name):
            yield member


def _unpacked(path: Path, wanted: Callable[[str], bool], file: BinaryIO) -> Iterator[tuple[str, tuple[int, int]]]:
    """Write the wanted members of a compressed tar to `file`; (name, (offset, bytes)) of each."""
    with _decompressor(path)(path) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in _members(tar, wanted):
                data = tar.extractfile(member).read()
                place = file.tell(), len(data)
                with told(tempfile.gettempdir()):
                    file.write(data)
                yield member.name, place
        while stream.read(1 << 20):  # the checksum stands at the end
            pass
    with told(tempfile.gettempdir()):
        file.flush()


@contextlib.contextmanager
def _told_as_tar(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise DataError(f"{path}: not a tar file, or cut short ({e})") from None
