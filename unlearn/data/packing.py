"""Pack images into shards: from a folder, a tar, a zip or s3:// in one of the published layouts, or from any
records."""

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.data import archives, layouts, shards
from unlearn.data.columns import with_class_names
from unlearn.data.sources import OUTSIDE, Source
from unlearn.data.storage import Storage, told
from unlearn.errors import DataError

log = logging.getLogger(__name__)

GROUP_BYTES = 1 << 29  # images of a row group, which is in memory whole; fewer rows where they are larger
Record = dict  # image: bytes, label: int, id: str, optional subject: str


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of the images that can be decoded here."""
    from PIL import features

    some = {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    }
    return frozenset(
        some | ({".jp2"} if features.check("jpg_2000") else set()) | ({".avif"} if features.check("avif") else set())
    )


def build(
    src: str, dest: str, split: str | None = None, rows_per_group: int = 256, shard_bytes: int = 256 << 20,
    progress: Callable[[int, int], None] = lambda rows, total: None,
    layout: layouts.Layout | None = None, labels: str | None = None, classes: list[str] | None = None,
) -> shards.Manifest:  # fmt: skip
    """Pack `src` into shards at `dest` and write their manifest. The encoded images are stored unchanged.

    split: take only files below a folder of that name (`train` of `train/CLASS/FILE`). An image's id is its path.
    layout: guessed where it is None; labels, classes: see `layouts.arrange`.
    Raises DataError where there is nothing to pack, an image has no class, or `dest` holds shards already.
    """
    with opened(src, split, layout) as source:
        arranged = arrange(source, src, split, layout, labels, classes)
        total = len(arranged.labels)
        records = ({"image": source.read(n), "label": label, "id": n} for n, label in arranged.labels)
        return write(records, dest, arranged.classes, rows_per_group, shard_bytes, lambda rows: progress(rows, total))


def opened(src: str, split: str | None, layout: layouts.Layout | None) -> contextlib.AbstractContextManager[Source]:
    """The files of `src` that are images, or tell their classes."""

    def wanted(name: str) -> bool:
        suffix = PurePosixPath(name).suffix.lower()
        kind = suffix in suffixes() or (suffix in layouts.ABOUT and layout in (None, "webdataset"))
        return kind and (split is None or split in name.split("/")[:-1])

    return archives.source(src, wanted, True if layout in ("imagenet", "webdataset") else None)


def arrange(
    source: Source, src: str, split: str | None, layout: layouts.Layout | None, labels: str | None,
    classes: list[str] | None,
) -> layouts.Arranged:  # fmt: skip
    """The images of an opened source and their labels, after a warning for what is left out. Raises DataError."""
    images = [n for n in source.names if PurePosixPath(n).suffix.lower() not in layouts.ABOUT]
    about = [n for n in source.names if PurePosixPath(n).suffix.lower() in layouts.ABOUT]
    if not images:
        below = f" below a folder {split}" if split else ""
        outside = f"; left out: {count} {OUTSIDE}" if (count := source.left_out[OUTSIDE]) else ""
        raise DataError(f"{src}: no image in it laid out as CLASS/FILE{below}{outside}")
    _readable(images, src)
    arranged = layouts.arrange(images, about, source.read, src, layout, split, labels, classes)
    _tell(src, source.left_out, arranged.loose)
    return arranged


def _readable(names: list[str], src: str) -> None:
    """Raises DataError where a name is not valid UTF-8: it becomes the image's id."""
    wrong = [name for name in names if any("\ud800" <= c <= "\udfff" for c in name)]
    if wrong:
        shown = wrong[0].encode(errors="replace").decode()
        raise DataError(f"{src}: the names of {len(wrong)} file(s) are not UTF-8, for example {shown}; rename them")


def _tell(src: str, left_out: Counter, loose: int) -> None:
    counts = [f"{count} {what}" for what, count in left_out.most_common() if count]
    if loose:
        counts.append(f"{loose} image(s) without a class folder")
    if counts:
        log.warning("%s: left out: %s", src, ", ".join(counts))


def write(
    records: Iterable[Record], dest: str, classes: list[str], rows_per_group: int = 256, shard_bytes: int = 256 << 20,
    progress: Callable[[int], None] = lambda rows: None,
) -> shards.Manifest:  # fmt: skip
    """Write records as shards of about `shard_bytes`, and their manifest last. One row group is in memory at a time."""
    storage = Storage(dest)
    if any(n.endswith(".parquet") or shards.is_manifest(n) for n in storage.files()):
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


def write_shard(records: Iterable[Record], storage: Storage, name: str, classes: list[str], rows_per_group: int) -> int:
    """Write all records as one shard, published whole; the rows in it. Where there is none, there is no shard."""
    groups, written = _groups(records, rows_per_group, classes), 0
    if (first := next(groups, None)) is not None:
        with storage.writing(name) as path, _writer(path, first.schema, storage.where(name)) as write_group:
            for group in itertools.chain([first], groups):
                write_group(group)
                written += group.num_rows
    return written


def _groups(records: Iterable[Record], rows: int, classes: list[str]) -> Iterator[pa.Table]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record["image"])
        if len(batch) == rows or size >= GROUP_BYTES:
            yield _table(batch, classes)
            batch, size = [], 0
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
