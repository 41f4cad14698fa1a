"""The loader against those that people use: images a second of processor time (of the process and all its children),
and by the clock.

The same JPEGs, to uint8 batches of the model's size; each peer with its usual decode and resize, and with ours:

webdataset   tars, WebDataset behind torch's DataLoader    streaming   MDS, MosaicML's StreamingDataset behind the same
ray          Parquet, ray.data's map_batches               datasets    Parquet, Hugging Face's, behind the same
spdl         Parquet, a pipeline of threads; its own decode and resize is FFmpeg's
pyarrow      Parquet, row groups read by pyarrow in a DataLoader

Usual is PIL's decode and bicubic resize by torchvision's transforms, where nothing else is said. ours: `cache: none`,
and `decoded`, which the second epoch reads; bare: decode and resize alone, on bytes in memory, in one thread. Making
a loader is not counted, starting its processes is. With --at s3://bucket/prefix ours are measured from there too.

The peers are no dependencies. Those that are not there are left out:

pip install --target peers --no-deps webdataset mosaicml-streaming datasets spdl spdl-core spdl-io braceexpand \\
    xxhash dill multiprocess catalogue brotli python-snappy cramjam zstd
PYTHONPATH=peers python -m jobs.benchmarks.peers CONFIG [--set a.b=c] [--rounds 3] [--images 1536] [--only ours,bare] \\
    [--at s3://bucket/prefix]
"""

# The peers are no dependencies.
# pyright: reportMissingImports=false

import argparse
import gc
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from jobs.benchmarks import command
from jobs.benchmarks.peer_loaders import BATCH, PEERS, WORKERS, Epochs, Ours, To, Usual, encoded, one_thread
from unlearn import config
from unlearn.data import shards
from unlearn.data.loader import Loader
from unlearn.data.storage import Storage
from unlearn.models import weights
from unlearn.run import resolve


def ours(settings: config.RunConfig, kept: str) -> Epochs:
    """Every image once an epoch: the set is as large as what is measured."""
    model = weights.build(settings.model, settings.seed)
    data = settings.data.model_copy(update={"cache": kept, "decode_threads": WORKERS})
    changed = settings.model_copy(update={"data": data})
    sets = resolve(changed).sets
    loader = Loader(changed, sets, model.grid, model.options.image_size)
    each = sum(map(len, sets.values())) // changed.micro_batch
    numbers = itertools.count()
    return lambda: (batch.images for batch in loader.batches(itertools.islice(numbers, each)))


def bare(folder: Path, to: To) -> Epochs:
    images = list(encoded(folder))
    return lambda: ([to(data) for data in images[start : start + BATCH]] for start in range(0, len(images), BATCH))


def prepare(settings: config.RunConfig, folder: Path, images: int) -> None:
    """Write the first `images` of the data set as Parquet, tars and MDS."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest, found = shards.find(settings.data.train, settings.data.split), []
    for group in range(len(manifest.groups)):
        if len(found) < images:
            found += [bytes(view) for view in shards.images(manifest.read(group, ["image"]))]
    found = found[:images]
    (folder / "parquet").mkdir()
    table = pa.table({"image": pa.array(found, pa.binary()), "label": [0] * len(found)})
    pq.write_table(table, folder / "parquet" / "0.parquet", row_group_size=128, compression="none")
    shards.index(str(folder / "parquet"))
    try:
        import webdataset as wds

        (folder / "tar").mkdir()
        for part in range(WORKERS):
            with wds.TarWriter(str(folder / "tar" / f"{part:03d}.tar")) as tar:
                for number, data in enumerate(found[part::WORKERS]):
                    tar.write({"__key__": f"{number:06d}", "jpg": data})
    except ImportError:
        pass
    try:
        from unlearn import torchvision_cpu  # noqa: F401  before what imports torchvision

        from streaming import MDSWriter  # isort: skip

        with MDSWriter(out=str(folder / "mds"), columns={"image": "bytes"}) as writer:
            for data in found:
                writer.write({"image": data})
    except ImportError:
        pass


def sent(source: Storage, to: Storage) -> str:
    """The same files at another place; where."""
    for name in source.files():
        to.write(name, source.read(name))
    return to.uri


def measure(settings: config.RunConfig, name: str, way: str, folder: Path) -> list[tuple[float, float]]:
    """(images a second of processor time, by the clock) of the first two epochs."""
    size = weights.build(settings.model, settings.seed).options.image_size
    to = Usual(size) if way == "usual" else Ours(size)
    epochs = ours(settings, way) if name in ("ours", "ours-s3") else {**PEERS, "bare": bare}[name](folder, to)
    rates = []
    for _ in range(2):
        began, used = time.perf_counter(), _processor_time()
        count = sum(len(batch) for batch in epochs())
        if not count:
            raise RuntimeError("it gave no image")
        rates.append((count / (_processor_time() - used), count / (time.perf_counter() - began)))
    return rates


def _processor_time() -> float:
    """Seconds of this process and of all its children, those that have ended too."""
    used, me = time.process_time() + sum(os.times()[2:4]), psutil.Process()
    for child in me.children(recursive=True):
        try:
            times = child.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
        except psutil.Error:
            continue
    return used


def compare(settings: config.RunConfig, options: argparse.Namespace) -> None:
    """Print a line for each loader, and how ours stands to the best."""
    one_thread()
    cases = [
        ("bare", "ours"),
        ("bare", "usual"),
        ("ours", "none"),
        ("ours", "decoded"),
        *((p, w) for p in PEERS for w in ("usual", "ours")),
    ]
    if options.at:
        cases += [("ours-s3", "none"), ("ours-s3", "decoded")]
    cases = [case for case in cases if options.only is None or case[0] in options.only.split(",")]
    # Ray comes last: processes are forked for the others, and it leaves threads behind.
    turns = [
        case for each in (False, True) for _ in range(options.rounds) for case in cases if (case[0] == "ray") == each
    ]
    rates: dict[tuple[str, str], list] = {}
    left_out: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as folder:
        prepare(settings, Path(folder), options.images)
        shards_of = {name: f"{folder}/parquet" for name, _ in cases}
        if options.at:
            shards_of["ours-s3"] = sent(Storage(f"{folder}/parquet"), Storage(options.at))
        for case in turns:
            if case in left_out:
                continue
            data = settings.data.model_copy(update={"train": shards_of[case[0]]})
            here = settings.model_copy(update={"data": data})
            try:
                rates.setdefault(case, []).append(measure(here, case[0], case[1], Path(folder)))
                print(*case, *(f"{rate:,.0f}" for epoch in rates[case][-1] for rate in epoch), flush=True)
            except Exception as e:  # a peer that is not there, or lacks a library of its own: whatever it raises
                left_out.add(case)
                rates.pop(case)
                print(f"{case[0]} {case[1]} left out: {type(e).__name__}: {e}"[:160], flush=True)
            gc.collect()  # ends the processes of a peer
    tell(rates)


def tell(rates: dict[tuple[str, str], list]) -> None:
    """Print the medians of all rounds, and how ours stand to the best of the others."""
    print("median of all rounds: images/s of processor time in epoch 1 and 2, by the clock in epoch 1 and 2")
    middle = {case: np.median(np.array(found), axis=0) for case, found in rates.items()}
    for (name, way), ((one, clock_one), (two, clock_two)) in middle.items():
        print(f"{name:10} {way:6} {one:9,.0f} {two:9,.0f} {clock_one:9,.0f} {clock_two:9,.0f}")
    mine, plain, bare_rate = middle.get(("ours", "decoded")), middle.get(("ours", "none")), middle.get(("bare", "ours"))
    remote = {way: middle.get(("ours-s3", way)) for way in ("none", "decoded")}
    usual = {case: found for case, found in middle.items() if case[1] == "usual" and case[0] != "bare"}
    if mine is not None and usual:
        for epoch in (0, 1):
            best = max(usual, key=lambda case: usual[case][epoch][0])
            ratio = mine[epoch][0] / usual[best][epoch][0]
            print(f"epoch {epoch + 1}: ours / the best in its usual way ({best[0]}), processor time: {ratio:.2f}")
    for name, found in (("decoded", mine), ("none", plain), *((f"{way}, S3", one) for way, one in remote.items())):
        if found is not None and bare_rate is not None:
            ratio = found[0][0] / bare_rate[0][0]
            print(f"epoch 1, cache {name}: ours / bare decode and resize, processor time: {ratio:.2f}")


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--only")
    parser.add_argument("--at", help="s3:// where the same shards are put")
    options = parser.parse_args()
    command.main("jobs.benchmarks.peers", lambda: compare(command.settings(options), options))
