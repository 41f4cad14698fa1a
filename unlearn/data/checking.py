"""Look at shards as they are stored: every checksum, every image, and what they hold."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unlearn.data import selection, shards
from unlearn.data.decode import decode
from unlearn.data.storage import Storage, local_copy
from unlearn.errors import DataError, ImageError


def verify(
    uri: str, threads: int = 4, progress: Callable[[int, int], None] = lambda done, total: None,
    split: str | None = None
) -> int:  # fmt: skip
    """Check sizes and checksums of all shards and decode all images; the number of images.

    Shards without a manifest are read and decoded; there is nothing that their bytes could be compared with.
    Raises DataError that names every damaged shard, else the first damaged images and how many there are.
    """
    manifest, wrong = shards.find(uri, split), []
    image = manifest.names.get("image", "image")
    bad: list[int] = []
    first = 0
    with ThreadPoolExecutor(threads) as pool:
        for shard in manifest.shards:
            for encoded in _images(Storage(uri), shard, image, wrong):
                bad += [first + i for i, good in enumerate(pool.map(_decodes, encoded)) if not good]
                first += len(encoded)
                progress(first, manifest.rows)
    if wrong:
        raise DataError(
            f"{uri}: {len(wrong)} of {len(manifest.shards)} shards are damaged: {'; '.join(wrong[:5])}. Restore them"
        )
    if bad:
        names = ", ".join(selection.name_row(manifest, row) for row in bad[:5])
        raise DataError(f"{uri}: {len(bad)} of {manifest.rows} images do not decode: {names}. Mend or remove them")
    return manifest.rows


def inspect(uri: str, split: str | None = None) -> dict[str, object]:
    """What the shards at `uri` hold, in words; they need no manifest."""
    manifest = shards.find(uri, split)
    counts = manifest.counts
    if not counts and "label" in manifest.columns:
        counts = Counter(manifest.table(["label"])["label"].to_pylist())
    some = [
        f"{manifest.class_name(label) if label < len(manifest.classes) else label} ({count})"
        for label, count in sorted(counts.items())
    ]
    size = sum(s.bytes for s in manifest.shards)
    return {
        "images": manifest.rows,
        "bytes": f"{size:,} ({size / max(1, manifest.rows):,.0f} an image)",
        "shards": f"{len(manifest.shards)} with {len(manifest.groups)} row groups",
        "columns": ", ".join(
            f"{role} ({manifest.names[role]})" if role in manifest.names else role for role in manifest.columns
        ),
        "classes": f"{len(counts)}: {', '.join(some[:20])}{', ...' if len(some) > 20 else ''}" if counts else "none",
        "hash": manifest.hash,
    }


def _images(storage: Storage, shard: shards.Shard, column: str, wrong: list[str]) -> Iterator[list[memoryview]]:
    """The images of each row group of a shard that is what the manifest says; else `wrong` is told why it is not."""
    if not storage.is_file(shard.path):
        wrong.append(f"{shard.path} is missing")
        return
    with local_copy(storage.where(shard.path)) as path:
        if damage := _damage(path, shard):
            wrong.append(damage)
            return
        with shards.parquet(Storage(path.parent), path.name) as file:
            for g in range(len(shard.row_groups)):
                table = file.read_row_group(g, columns=[column])
                yield list(shards.images(table.rename_columns(["image"])))


def _damage(path: Path, shard: shards.Shard) -> str | None:
    if (size := path.stat().st_size) != shard.bytes:
        return f"{shard.path} has {size} bytes, not {shard.bytes}"
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return f"{shard.path} has another checksum"
    return None


def _decodes(encoded: memoryview) -> bool:
    try:
        decode(encoded)
        return True
    except ImageError:
        return False
