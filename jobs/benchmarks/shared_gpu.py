"""Two trials on one GPU: their weights beside those of the same runs one after the other, and the time of both ways.

    python -m jobs.benchmarks.shared_gpu [CONFIG] [--set a.b=c] [--rounds 3]

Each trial is a process group of one process, as a slot of a sweep with `cluster.gpus_per_worker: 0.5` and `concurrent:
2` is, and takes half of the memory. Ray is not needed. Without a GPU both compute on the CPU, with gloo.
"""

import hashlib
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.benchmarks import command
from unlearn import config
from unlearn.run import resolve
from unlearn.training.loop import worker

ALPHAS = (0.1, 1.0)


def trial(rank: int, settings: list[config.RunConfig], folder: str) -> None:
    """What a process does: train one of the runs in a group of its own."""
    mine = settings[rank]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed looks for them
    file = Path(folder, f"group-{rank}").as_uri()
    dist.init_process_group(_backend(), init_method=file, rank=0, world_size=1)
    began: list[float] = []
    worker(resolve(mine), lambda row: began.append(time.time()))
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    Path(mine.run_dir, "spent").write_text(f"{began[0]} {began[-1]} {peak}")
    dist.destroy_process_group()


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def started(settings: list[config.RunConfig], folder: str) -> tuple[float, list[str]]:
    """Train these runs at one time. (seconds from the first row of any to the last of any, digests of the weights)."""
    Path(folder).mkdir(exist_ok=True)
    torch.multiprocessing.spawn(trial, (settings, folder), len(settings))
    spans = [list(map(float, Path(each.run_dir, "spent").read_text().split())) for each in settings]
    print("  " + ", ".join(f"{end - start:.2f} s, at most {peak / 2**30:.2f} GiB" for start, end, peak in spans))
    seconds = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    return seconds, [_weights(each.run_dir) for each in settings]


def _weights(run_dir: str) -> str:
    """A digest of the newest checkpoint's weights."""
    digest, newest = hashlib.sha256(), max(Path(run_dir, "checkpoints").iterdir())
    for path in sorted(newest.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def benchmark(settings: config.RunConfig, rounds: int) -> None:
    together, apart = [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="unlearn-benchmark-") as folder:

            def run(name: str, folder: str = folder) -> list[config.RunConfig]:
                return [
                    settings.model_copy(update={
                        "run_dir": f"{folder}/{name}-{alpha}",
                        "method": settings.method.model_copy(update={"alpha": alpha}),
                    })
                    for alpha in ALPHAS
                ]  # fmt: skip

            side_by_side, weights = started(run("shared"), f"{folder}/shared")
            alone = [started([each], f"{folder}/alone-{n}") for n, each in enumerate(run("alone"))]
        assert weights == [digest for _, (digest,) in alone], "a neighbour changes no weight"
        together.append(side_by_side)
        apart.append(sum(seconds for seconds, _ in alone))
        print(f"round {number}: side by side {side_by_side:.2f} s, one by one {apart[-1]:.2f} s", flush=True)
    command.tell_ratio("two trials on one device, side by side / one by one", together, apart)


if __name__ == "__main__":
    options = command.parser(__doc__).parse_args()
    few = ["cluster.workers=1", "training.steps=40", "training.log_every=10", "training.checkpoint_every=40"]
    few += ["cluster.gpus_per_worker=0.5"] if torch.cuda.is_available() else []
    command.main("jobs.benchmarks.shared_gpu", lambda: benchmark(command.settings(options, few), options.rounds))
