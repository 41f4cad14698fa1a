"""What a sweep saves against the same runs one by one, and what of its time is neither training nor measuring.

    python -m jobs.benchmarks.sweep [CONFIG] [--set a.b=c] [--alone 4] [--slots 2] [--trials 16]

Sixteen trials: four alphas by four sizes of the forget set, `--slots` at one time with one worker each. The baseline is
`unlearn run` of `--alone` of the same runs, each with as many workers as there are slots, so that both have the same
cores; its total is theirs times 16 / alone. The two run one after the other on the same machine: trust the ratios, not
the seconds. Processor time is that of all processes of either, Ray's own among them: a busy machine changes it little.
What of it is not the workers' is told apart: the driver's, and that of the processes Ray starts. --trials: the first so
many alone; --alone 0: no baseline.
"""

import contextlib
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from jobs import sweep as job
from jobs.benchmarks import command
from unlearn import config
from unlearn.search import space, sweep_file
from unlearn.search.records import Trial

ALPHAS, SIZES = (0.05, 0.1, 0.25, 0.5), (50, 100, 200, 400)


def made(settings: config.RunConfig, folder: str, slots: int, trials: int) -> space.Sweep:
    """The sweep of the benchmark, in `folder`; trials: how many of its points."""
    return sweep_file.parse({
        "sweep_dir": folder, "run": settings.model_dump(mode="json", exclude_defaults=True),
        "set": {"cluster.workers": 1},
        "search": {"method.alpha": {"grid": list(ALPHAS)}, "data.forget.per_class": {"grid": list(SIZES)}},
        "objectives": {"retain.cosine.drop": "minimise", "forget.cosine.drop": "maximise"}, "search_by": "grid",
        "concurrent": slots, "budget": {"points": trials}, "tune_on": {"limit": settings.evaluation.limit},
    })  # fmt: skip


class Cost:
    """Seconds by the clock, and of processors by all processes that this one has started, ended ones as last seen."""

    def __init__(self):
        self.clock, self._spent = 0.0, {}
        self._workers = set()  # those of its keys that are workers of Ray Train

    @property
    def processor(self) -> float:
        return math.fsum(self._spent.values())

    @property
    def beside(self) -> float:
        """Of the processors, what is not the workers'."""
        return math.fsum(seconds for process, seconds in self._spent.items() if process not in self._workers)

    def look(self) -> None:
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                key = process.pid, process.create_time()
                self._spent[key] = times.user + times.system
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    self._workers.add(key)

    def less(self, before: "Cost") -> None:
        """Leave out what was spent before."""
        for process, seconds in before._spent.items():
            if process in self._spent:
                self._spent[process] -= seconds


@contextlib.contextmanager
def spent() -> Iterator[Cost]:
    """What a block costs."""
    cost, over, before, began = Cost(), threading.Event(), Cost(), time.perf_counter()
    before.look()

    def watch() -> None:
        while not over.wait(0.5):
            cost.look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield cost
    finally:
        over.set()
        watcher.join()
        cost.clock = time.perf_counter() - began
        cost.less(before)


def alone(sweep: space.Sweep, trials: Sequence[Trial], folder: Path) -> list[Cost]:
    """What `unlearn run` of each trial's run costs, with a worker for each slot."""
    costs = []
    for trial in trials:
        settings = sweep.of(trial.parameters, trial.seed, trial.model, trial.id)
        path = folder / f"{trial.id}.yaml"
        path.write_text(config.dump(settings.model_copy(update={"run_dir": str(folder / trial.id)})))
        workers = ["--set", f"cluster.workers={sweep.concurrent}"]
        command = [sys.executable, "-m", "unlearn", "run", str(path), *workers]
        with spent() as cost:
            subprocess.run(command, check=True, capture_output=True)
        costs.append(cost)
        print(f"alone    {trial.id}  {cost.clock:6.1f} s, of processors {cost.processor:6.1f} s", flush=True)
    return costs


def benchmark(settings: config.RunConfig, count: int, slots: int, points: int) -> None:
    """Run the sweep, then `count` of its runs alone, and print the ratio and the shares."""
    with tempfile.TemporaryDirectory(prefix="unlearn-benchmark-") as folder:
        sweep = made(settings, f"{folder}/sweep", slots, points)
        with spent() as whole:
            job.prepare(sweep)
            trials = job.sweep(sweep)
        for trial in trials:
            parts = "  ".join(f"{name} {seconds:6.2f} s" for name, seconds in trial.seconds.items())
            warmth = "warm" if trial.warm else "cold"
            print(f"{warmth:8} {trial.id}  {sum(trial.seconds.values()):6.1f} s: {parts}", flush=True)
        costs = alone(sweep, trials[:: max(1, len(trials) // max(1, count))][:count], Path(folder))
    for what, kind in (("cold", False), ("warm", True)):
        if seconds := [sum(trial.seconds.values()) for trial in trials if trial.warm == kind]:
            print(f"seconds a {what} trial: {statistics.mean(seconds):.1f}")
    print(f"of processors {whole.processor:.0f} s, of which beside the workers {whole.beside:.0f} s")
    if costs:
        print(f"{len(trials)} trials as a sweep, and one by one ({count} of them were run):")
        for what, mine, base in (
            ("by the clock", whole.clock, [cost.clock for cost in costs]),
            ("of processors", whole.processor, [cost.processor for cost in costs]),
        ):
            total = statistics.mean(base) * len(trials)
            print(f"  {what}: {mine:.0f} s, {total:.0f} s: {mine / total:.2f} x")
    shares = {
        name: math.fsum(t.seconds.get(name, 0) for t in trials) / slots / whole.clock for name in ("train", "measure")
    }
    neither = 1 - sum(shares.values())
    print(f"training {shares['train']:.0%}, measuring {shares['measure']:.0%}, neither {neither:.0%}")


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--alone", type=int, default=4)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--trials", type=int, default=len(ALPHAS) * len(SIZES))
    options = parser.parse_args()
    command.main(
        "jobs.benchmarks.sweep",
        lambda: benchmark(
            command.settings(options, ["evaluation.limit=200", "training.steps=100"]),
            options.alone,
            options.slots,
            options.trials,
        ),
    )
