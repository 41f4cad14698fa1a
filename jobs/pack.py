"""Pack: images into shards, by many workers; behind `unlearn pack` and `unlearn submit --driver pack`.

The driver lists the source and arranges its images; shard N is rows N * rows_per_shard and on of that order, so the
shards are the same for any number of workers. Ray Data hands the numbers out: what it moves are names, and a worker
reads, scales and writes the images of a shard itself, one row group after the other. Had Ray Data moved the images, a
shard would have been what its blocks came to, in the order in which they came, and their bytes would have been in its
object store.

A shard is published whole, so one that is there is done: the same packing goes on behind a kill. `_pack.json` says
whose shards they are.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jobs.pool import on_cluster
from unlearn import log as logs
from unlearn.data import order, packing, shards
from unlearn.data.node_cache import node_copy
from unlearn.data.pack_file import QUALITY, Packing
from unlearn.data.recode import recoded
from unlearn.data.storage import Storage, local_copy
from unlearn.data.unpacked import plain
from unlearn.documents import from_json
from unlearn.errors import DataError, ImageError, UnlearnError

log = logging.getLogger(__name__)

ABOUT = "_pack.json"
Piece = dict[str, Any]  # shard: its name; names, labels: of its images
Progress = Callable[[int, int], None]


def pack(found: Packing, progress: Progress = lambda done, total: None) -> shards.Manifest:
    """Pack what is not packed yet, and write the manifest. progress: called with shards done, and all. Raises
    UnlearnError."""
    storage = Storage(found.dest)
    names, classes = _arranged(found)
    listing = hashlib.sha256(json.dumps([names, classes]).encode()).hexdigest()
    _own(storage, {"packing": found.identity(), "images": listing})
    pieces = [
        {"shard": f"shard-{number:05d}.parquet", "names": [n for n, _ in part], "labels": [label for _, label in part]}
        for number, start in enumerate(range(0, len(names), found.rows_per_shard))
        for part in [names[start : start + found.rows_per_shard]]
    ]
    there = set(storage.files())
    missing = [piece for piece in pieces if piece["shard"] not in there]
    done = len(pieces) - len(missing)
    progress(done, len(pieces))
    with _mapped(found, classes) as mapped:
        for result in mapped(missing):
            if result["error"]:
                raise UnlearnError(result["error"])
            done += 1
            progress(done, len(pieces))
    if missing or not shards.is_indexed(found.dest):
        shards.index(found.dest, classes=classes or None)
    manifest = shards.load(found.dest)
    if left_out := len(names) - manifest.rows:
        log.warning("%s: left out: %d damaged image(s)", found.source, left_out)
    return manifest


def _arranged(found: Packing) -> tuple[list[tuple[str, int]], list[str]]:
    """((name, label) of every image in the order in which they are packed, the names of the classes)."""
    near = _near(found.source)
    with contextlib.ExitStack() as stack:
        labels = None if found.labels is None else str(stack.enter_context(local_copy(found.labels)))
        source = stack.enter_context(packing.opened(near, found.split, found.layout))
        if source.in_tars and near.startswith("s3://"):  # a worker reads an object by its name
            raise DataError(
                f"{near}: images in tars below a prefix of S3 are not packed by many workers: use `unlearn shards "
                "build`, or copy the tars to a folder that every worker sees"
            )
        arranged = packing.arrange(source, found.source, found.split, found.layout, labels, found.classes)
    names = arranged.labels
    if found.order == "shuffled":
        names = [names[i] for i in order.generator(found.seed).permutation(len(names)).tolist()]
    return names, arranged.classes


def _near(source: str) -> str:
    """The source, or the copy of an archive that all processes of a machine share: it is fetched from S3 once, and a
    compressed tar is unpacked once."""
    storage = Storage(source)
    if not storage.is_local():
        return str(plain(node_copy(source))) if storage.is_file() else source
    return str(plain(Path(storage.uri)))


def _own(storage: Storage, about: dict[str, str]) -> None:
    """Begin the packing, or go on with it. Raises DataError where the shards there are of another one."""
    if storage.create(ABOUT, json.dumps(about).encode()):
        if any(name.endswith(".parquet") or shards.is_manifest(name) for name in storage.files()):
            storage.delete(ABOUT)
            raise DataError(f"{storage.uri}: holds shards already; give an empty folder")
        return
    try:
        before = dict(from_json(storage.read(ABOUT)))
    except (TypeError, ValueError):
        raise DataError(f"{storage.where(ABOUT)} is damaged; give an empty folder") from None
    for key, what in (("packing", "was packed in another way"), ("images", "was packed from other images")):
        if before.get(key) != about[key]:
            raise DataError(f"{storage.uri}: {what}; give an empty folder, or the same packing to go on with it")


@contextlib.contextmanager
def _mapped(found: Packing, classes: list[str]) -> Iterator[Callable[[list[Piece]], Iterable[dict]]]:
    """A function that packs pieces over the workers; in this process where one worker is enough and no cluster is at
    hand."""
    if found.cluster.workers == 1 and not on_cluster(found.cluster):
        packer = ShardPacker(found, classes)
        try:
            yield lambda pieces: map(packer, pieces)
        finally:
            packer.close()
        return

    from jobs.cluster import connected

    cluster = found.cluster
    with connected(cluster, cluster.min_workers or cluster.workers):
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.enable_operator_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)

        def mapped(pieces: list[Piece]) -> Iterable[dict]:
            if not pieces:
                return
            least = cluster.min_workers or cluster.workers
            packer: Any = ShardPacker  # a class; Ray declares functions alone
            data = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map(
                packer, fn_constructor_args=(found, classes, logs.level()), num_cpus=cluster.cpus_per_worker,
                compute=ray.data.ActorPoolStrategy(min_size=least, max_size=cluster.workers),
            )  # fmt: skip
            yield from data.iter_rows()

        yield mapped


class ShardPacker:
    """What a worker does: it packs one shard after another. A mistake of the user comes back as a value, which is not
    retried."""

    def __init__(self, found: Packing, classes: list[str], level: str | None = None):
        """level: from what on a worker of a cluster logs."""
        if level is not None:
            logs.start_worker(level)
        self.found, self.classes, self._open = found, classes, contextlib.ExitStack()
        self._read: Callable[[str], bytes] | None = None

    def __call__(self, piece: Piece) -> dict:
        """{"shard": its name, "error": what is wrong, or nothing}."""
        try:
            labels = np.asarray(piece["labels"]).tolist()
            rows = zip(map(str, piece["names"]), labels, strict=True)
            packing.write_shard(
                self._records(rows), Storage(self.found.dest), piece["shard"], self.classes, self.found.rows_per_group
            )
            return {"shard": piece["shard"], "error": ""}
        except UnlearnError as e:
            return {"shard": piece["shard"], "error": str(e)}

    def close(self) -> None:
        self._open.close()

    def _records(self, rows: Iterable[tuple[str, int]]) -> Iterator[packing.Record]:
        found = self.found
        for name, label in rows:
            data = self._source()(name)
            if found.encodes:
                try:
                    data = recoded(data, found.size, found.quality or QUALITY, found.lossless, found.orientation)
                except ImageError as e:
                    if found.leave_out_damaged:
                        continue
                    raise DataError(f"{name} does not decode ({e}); mend it, or set leave_out_damaged") from None
            yield {"image": data, "label": label, "id": name}

    def _source(self) -> Callable[[str], bytes]:
        """How a file of the source is read: an object on S3 by its name, without listing all of them again."""
        if self._read is None:
            near = _near(self.found.source)
            if near.startswith("s3://"):
                self._read = Storage(near).read
            else:
                self._read = self._open.enter_context(packing.opened(near, self.found.split, self.found.layout)).read
        return self._read
