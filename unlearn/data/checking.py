"""Look at shards as they are stored: every checksum, every image, and what they hold."""

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from unlearn.data import selection, shards
from unlearn.data.decode import decode
from unlearn.data.storage import Storage
from unlearn.errors import DataError


def verify(uri: str, threads: int = 4, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Check sizes and checksums of all shards and decode all images; the number of images.

    Raises DataError that names every damaged shard, else the first damaged images and how many there are.
    """
    manifest, storage = shards.load(uri), Storage(uri)
    wrong = [text for shard in manifest.shards if (text := _damage(storage, shard))]
    if wrong:
        raise DataError(f"{uri}: {len(wrong)} of {len(manifest.shards)} shards are damaged: {'; '.join(wrong[:5])}. Restore them")
    bad: list[int] = []
    with ThreadPoolExecutor(threads) as pool:
        for group, start in enumerate(manifest.starts[:-1].tolist()):
            encoded = list(shards.images(manifest.read(group, ["image"])))
            bad += [start + i for i, good in enumerate(pool.map(_decodes, encoded)) if not good]
            progress(start + len(encoded), manifest.rows)
    if bad:
        names = ", ".join(selection.name_row(manifest, row) for row in bad[:5])
        raise DataError(f"{uri}: {len(bad)} of {manifest.rows} images do not decode: {names}. Mend or remove them")
    return manifest.rows


def inspect(uri: str) -> dict[str, object]:
    """What the shards at `uri` hold, in words."""
    manifest = shards.load(uri)
    counts = Counter(manifest.table(["label"])["label"].to_pylist())
    name = dict(enumerate(manifest.classes))
    some = [f"{name.get(label, label)} ({count})" for label, count in sorted(counts.items())]
    size = sum(s.bytes for s in manifest.shards)
    return {
        "images": manifest.rows,
        "bytes": f"{size:,} ({size / max(1, manifest.rows):,.0f} an image)",
        "shards": f"{len(manifest.shards)} with {len(manifest.groups)} row groups",
        "columns": ", ".join(manifest.columns),
        "classes": f"{len(counts)}: {', '.join(some[:20])}{', ...' if len(some) > 20 else ''}",
        "hash": manifest.hash,
    }


def _damage(storage: Storage, shard: shards.Shard) -> str | None:
    if not storage.is_file(shard.path):
        return f"{shard.path} is missing"
    data = storage.read(shard.path)
    if len(data) != shard.bytes:
        return f"{shard.path} has {len(data)} bytes, not {shard.bytes}"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return f"{shard.path} has another checksum"
    return None


def _decodes(encoded: memoryview) -> bool:
    try:
        decode(encoded)
        return True
    except (ValueError, OSError):
        return False
