"""How much memory the workers of a run take, fresh and resumed.

    python -m jobs.benchmarks.memory [CONFIG] [--gigabytes 1] [--set a.b=c]

Trains a masked autoencoder of random weights, of that many gigabytes in float32, with two workers and ZeRO-2 for two
steps; then again from the checkpoint of the first step. Told is the most that the workers took together at one moment,
as proportional set size: what processes share counts once. Where run_dir is on S3 its temporary files are counted too.
"""

import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from jobs import train
from jobs.benchmarks import command
from jobs.cluster import connected
from unlearn import config
from unlearn.data.storage import Storage
from unlearn.models import weights

EVERY = 0.25  # seconds between two looks
WIDTH = 1024
RUN = [
    "cluster.workers=2", "training.engine=deepspeed", "training.zero_stage=2", "training.steps=2",
    "training.checkpoint_every=1", "training.keep_checkpoints=2", "training.batch_size=16",
    "training.micro_batch_size=8", "evaluation.oracle=null",
]  # fmt: skip


def model(gigabytes: float) -> config.Model:
    """A masked autoencoder of about this size: a block has 12 width^2 parameters."""
    depth = max(1, round(gigabytes * 1e9 / 4 / (12 * WIDTH**2)))
    sizes = {"image_size": 32, "patch_size": 8, "width": WIDTH, "depth": depth, "heads": 16}
    return config.Model(options=sizes | {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 4})


def workers() -> Iterator[psutil.Process]:
    """Ray Train's workers that this process has started."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline() or [process.name()]):
                yield process
        except psutil.Error:
            pass


def taken() -> int:
    """Bytes that the workers take together now."""
    total = 0
    for process in workers():
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def files(folder: str) -> int:
    """Bytes of all files of a folder."""
    sizes = 0
    for path in Path(folder).rglob("*"):
        try:
            sizes += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            pass
    return sizes


def peaks(call: Callable[[], Any], temporary: str) -> tuple[int, int]:
    """(the most that the workers took while this was called, the most that lay in the folder of temporary files)."""
    most, held, over = 0, 0, threading.Event()

    def watch() -> None:
        nonlocal most, held
        while not over.wait(EVERY):
            most, held = max(most, taken()), max(held, files(temporary))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        call()
    finally:
        over.set()
        thread.join()
    return most, held


def memory(settings: config.RunConfig, temporary: str) -> None:
    """Train the run, take its last checkpoint away, and train it on."""
    with connected(settings.cluster, 2):
        for kind in ("fresh", "resumed"):
            run = train.prepare(settings, resume=kind == "resumed")
            most, held = peaks(lambda run=run: train.train(run), temporary)
            print(f"{kind:8} workers {most / 2**30:.2f} GiB, temporary files {held / 2**30:.2f} GiB", flush=True)
            Storage(settings.run_dir).delete(f"checkpoints/step-{run.steps:08d}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="unlearn-memory-") as folder:
        temporary = os.environ["TMPDIR"] = f"{folder}/temporary"
        os.mkdir(temporary)
        tempfile.tempdir = None  # it is asked for again, also by what is started
        made = model(options.gigabytes)
        weights.write(weights.build(made, 0), f"{folder}/model", {})
        size = os.path.getsize(f"{folder}/model/weights.safetensors")
        print(f"model    {math.ceil(size / 1e7) / 100:.2f} GB", flush=True)
        places = [f"run_dir={folder}/run", f"model={{weights: {folder}/model}}"]
        memory(command.settings(options, [*RUN, *places]), temporary)


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    options = parser.parse_args()
    command.main("jobs.benchmarks.memory", main)
