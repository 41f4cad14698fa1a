"""Pack images into shards: from a folder or a tar of `.../CLASS/FILE` (ImageNet, Places style), or from any records."""

import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.data import shards
from unlearn.data.storage import Storage
from unlearn.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
Record = dict  # image: bytes, label: int, id: str, optional subject: str


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
    names = sorted(_folder(path) if path.is_dir() else _tar_names(path))
    names = [n for n in names if split is None or split in n.split("/")[:-2]]
    if not names:
        raise DataError(f"{src}: no image in it laid out as CLASS/FILE" + (f" below a folder {split}" if split else ""))
    classes = sorted({_class(n) for n in names})
    labels = {c: i for i, c in enumerate(classes)}
    # Sorted by class, so that a row group holds few labels and a selection reads few row groups.
    names.sort(key=lambda n: (_class(n), n))
    read = _folder_reader(path) if path.is_dir() else _tar_reader(path)
    records = ({"image": read(n), "label": labels[_class(n)], "id": n} for n in names)
    return write(records, dest, classes, rows_per_group, shard_bytes, lambda rows: progress(rows, len(names)))


def write(
    records: Iterable[Record], dest: str, classes: list[str], rows_per_group: int = 256, shard_bytes: int = 256 << 20,
    progress: Callable[[int], None] = lambda rows: None,
) -> shards.Manifest:  # fmt: skip
    """Write records as shards of about `shard_bytes`, and their manifest last."""
    storage = Storage(dest)
    if any(n.endswith(".parquet") or n == shards.MANIFEST for n in storage.files()):
        raise DataError(f"{dest}: holds shards already; give an empty folder")
    number, written, groups, size = 0, 0, [], 0
    for group in _groups(records, rows_per_group):
        groups.append(group)
        size += group.nbytes
        written += group.num_rows
        progress(written)
        if size >= shard_bytes:
            _shard(storage, number, groups)
            number, groups, size = number + 1, [], 0
    if groups:
        _shard(storage, number, groups)
    manifest = shards.index(dest)
    named = shards.Manifest(manifest.uri, manifest.columns, classes, manifest.shards)
    shards.save(named)
    return named


def _groups(records: Iterable[Record], rows: int) -> Iterator[pa.Table]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == rows:
            yield _table(batch)
            batch = []
    if batch:
        yield _table(batch)


def _table(batch: list[Record]) -> pa.Table:
    columns = {
        "image": [{"bytes": r["image"], "path": r["id"]} for r in batch],
        "label": [r["label"] for r in batch],
        "id": [r["id"] for r in batch],
    }
    if "subject" in batch[0]:
        columns["subject"] = [r["subject"] for r in batch]
    return pa.table(columns, pa.schema([shards.SCHEMA.field(name) for name in columns]))


def _shard(storage: Storage, number: int, groups: list[pa.Table]) -> None:
    sink = pa.BufferOutputStream()
    # Encoded images do not compress further.
    with pq.ParquetWriter(sink, groups[0].schema, compression="none", write_page_index=True) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=group.num_rows)
    storage.write(f"shard-{number:05d}.parquet", sink.getvalue().to_pybytes())


def _class(name: str) -> str:
    return PurePosixPath(name).parent.name


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and PurePosixPath(name).parent.name != ""


def _folder(path: Path) -> list[str]:
    return [n for p in path.rglob("*") if p.is_file() and _is_image(n := p.relative_to(path).as_posix())]


def _folder_reader(path: Path) -> Callable[[str], bytes]:
    return lambda name: (path / name).read_bytes()


def _tar_names(path: Path) -> list[str]:
    try:
        with tarfile.open(path) as tar:
            return [m.name for m in tar if m.isfile() and _is_image(m.name)]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: not a tar file, or cut short ({e})") from None


def _tar_reader(path: Path) -> Callable[[str], bytes]:
    tar = tarfile.open(path)  # noqa: SIM115  read until the process ends
    return lambda name: tar.extractfile(name).read()
