"""What a large set costs before the first step, whatever its size: each in a fresh process, after its imports.

index        makes the manifest of the shards, which are made first where FOLDER holds none: images of some 700 bytes in
             rows that are sorted by 1,000 classes, 256 in a row group
check        `unlearn config check` with a forget set by class, by 1,000 ids, by a file of 1,000 ids, and drawn by
             default
first        the first batch, with nothing known of the set before
inspect      `unlearn shards inspect`

Told are seconds by the clock and of processor time, MiB by which the memory of the process has grown at most, and on S3
requests and MiB of the answers; and the size of the manifest.

python -m jobs.benchmarks.rows FOLDER [--rows 1300000] [--files 565]
"""

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs import demo, train
from jobs.benchmarks import command
from unlearn import config
from unlearn.data import checking, s3_client, shards
from unlearn.data.loader import Loader
from unlearn.data.storage import Storage
from unlearn.run import resolve

CLASSES, GROUP, CHOSEN = 1000, 256, 1000


def image() -> bytes:
    """A JPEG of 32 x 32 pixels."""
    sink = io.BytesIO()
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(sink, "JPEG")
    return sink.getvalue()


def made(folder: str, rows: int, files: int) -> None:
    """Write the shards. No two images have the same bytes: each ends with its number, which decoders leave out."""
    storage, encoded = Storage(folder), image()
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        images = [{"bytes": encoded + row.to_bytes(8, "little"), "path": None} for row in part.tolist()]
        columns = {
            "image": images, "label": part * CLASSES // rows, "id": [f"image-{row:09d}" for row in part.tolist()],
            "subject": [f"person-{row % 9973:05d}" for row in part.tolist()],
        }  # fmt: skip
        with storage.writing(f"part-{number:05d}.parquet") as path:
            pq.write_table(pa.table(columns, shards.SCHEMA), path, row_group_size=GROUP, compression="none")


def settings(folder: str, forget: config.Rows) -> config.RunConfig:
    run = demo.demo_config(overrides=["training.engine=torch", "cluster.workers=1", "evaluation.limit=100"])
    data = run.data.model_copy(update={"train": folder, "split": None, "forget": forget, "retain": None})
    evaluation = run.evaluation.model_copy(update={"data": None, "split": None})
    return run.model_copy(update={"data": data, "evaluation": evaluation})


def first(run: config.RunConfig) -> None:
    """The first micro-batch, by a loader that knows nothing yet."""
    Loader(run, resolve(run, measured=False).sets, 8, 32).batch(0)


def measure(folder: str, what: str) -> None:
    """Print what one call takes; it is the first of this process."""
    by_class = config.Rows(classes=[7])
    if what == "by ids" or what == "by a file":
        rows = shards.load(folder).rows
        ids = [f"image-{row:09d}" for row in np.random.default_rng(0).choice(rows, CHOSEN, replace=False).tolist()]
        path = Path(tempfile.mkdtemp(), "ids.txt")
        path.write_text("\n".join(ids))
        forget = config.Rows(ids=ids) if what == "by ids" else config.Rows(ids_from=str(path))
    else:
        forget = by_class if what in ("by class", "first") else config.Rows(limit=CHOSEN)
    run = settings(folder, forget)
    calls: dict[str, Callable[[], object]] = {
        "index": lambda: shards.index(folder), "inspect": lambda: checking.inspect(folder), "first": lambda: first(run),
    }  # fmt: skip
    call = calls.get(what, lambda: train.check(run))
    s3_client.requests.clear()
    received = counted()
    before, began, worked = memory(), time.monotonic(), time.process_time()
    call()
    took, worked = time.monotonic() - began, time.process_time() - worked
    sent = f"  {s3_client.requests.total()} requests, {received() / 2**20:.1f} MiB" if "://" in folder else ""
    print(
        f"{what:10} {took:6.2f} s  {worked:6.2f} s of processor time  {(memory() - before) >> 20:5} MiB{sent}",
        flush=True,
    )


def memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def counted() -> Callable[[], int]:
    """() -> bytes of the answers of S3 since the call."""
    sizes, lock = [0], threading.Lock()

    def add(parsed: dict, **_) -> None:
        with lock:
            sizes[0] += int(parsed.get("ContentLength") or 0)

    s3_client.of("").meta.events.register("after-call.s3.GetObject", add)
    return lambda: sizes[0]


def rows(options: argparse.Namespace) -> None:
    if options.measure:
        measure(options.folder, options.measure)
        return
    if not any(shards.is_shard(name) for name in Storage(options.folder).files()):
        made(options.folder, options.rows, options.files)
    for what in ("index", "inspect", "default", "by class", "by ids", "by a file", "first"):
        again = ["-m", "jobs.benchmarks.rows", options.folder, "--measure", what]
        subprocess.run([sys.executable, *again], check=True)
        if what == "index":
            size = Storage(options.folder).facts(shards.MANIFEST).size
            print(f"{'manifest':10} {size / 2**20:6.2f} MiB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="an empty folder, or s3://bucket/prefix, or one that this benchmark has filled")
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--files", type=int, default=565)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    command.main("jobs.benchmarks.rows", lambda: rows(given))
