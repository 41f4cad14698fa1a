"""What a slot saves by keeping what the teacher made: training with another alpha, and the targets of the run before.

    python -m jobs.benchmarks.targets [CONFIG] [--set a.b=c] [--rounds 3]
    python -m jobs.benchmarks.targets CONFIG --set cluster.gpus_per_worker=1 --set training.dtype=bf16

Training alone, without start and checkpoint, beside the same with everything kept but the targets: processor time, or
on a GPU the time by the clock. Ray is not needed. The losses of both are compared.
"""

import gc
import tempfile
import time

from jobs.benchmarks import command
from unlearn import config
from unlearn.run import resolve
from unlearn.training import metrics
from unlearn.training.kept import Kept
from unlearn.training.loop import worker


def seconds(settings: config.RunConfig, alphas: tuple[float, float], targets: bool) -> tuple[float, list[float], int]:
    """(seconds of the second of two trainings, its losses, bytes of the targets)."""
    kept, spent, losses = Kept(targets=targets), 0.0, []
    # A row is logged when the device has come to its end, so the clock between two rows is the device's.
    clock = time.perf_counter if settings.cluster.gpus_per_worker else time.process_time
    for alpha in alphas:
        with tempfile.TemporaryDirectory(prefix="unlearn-benchmark-") as folder:
            method = settings.method.model_copy(update={"alpha": alpha})
            run = resolve(settings.model_copy(update={"run_dir": folder, "method": method}))
            marks: list[float] = []
            worker(run, lambda row, marks=marks: marks.append(clock()), kept=kept)
            spent, losses = marks[-1] - marks[0], [row["loss"] for row in metrics.read(folder)]
        gc.collect()
    return spent, losses, kept.targets.bytes if kept.targets else 0


def benchmark(settings: config.RunConfig, rounds: int) -> None:
    kept, again = [], []
    for number in range(rounds):
        alphas = (0.1, 0.25 + number / 100)
        (one, losses, size), (other, same, _) = (seconds(settings, alphas, targets) for targets in (True, False))
        assert losses == same, "what is kept changes no result"
        kept.append(one)
        again.append(other)
        print(f"targets kept ({size / 2**20:.0f} MiB) {one:.2f} s, computed again {other:.2f} s", flush=True)
    what = "time by the clock" if settings.cluster.gpus_per_worker else "processor time"
    command.tell_ratio(f"targets kept / computed again, {what} of training", kept, again)


if __name__ == "__main__":
    options = command.parser(__doc__).parse_args()
    few = ["training.engine=torch", "cluster.workers=1", "training.steps=40", "training.log_every=10"]
    command.main("jobs.benchmarks.targets", lambda: benchmark(command.settings(options, few), options.rounds))
