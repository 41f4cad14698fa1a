"""What a sweep saves against the same runs one by one, and what of its time is neither training nor measuring.

    python -m jobs.benchmarks.sweep [CONFIG] [--set a.b=c] [--alone 4] [--slots 2]

Sixteen trials: four alphas by four sizes of the forget set, `--slots` at one time with one worker each. The baseline is `unlearn run` of
`--alone` of the same runs, each with as many workers as there are slots, so that both have the same cores; its total is
theirs times 16 / alone. The two run one after the other on the same machine: trust the ratios, not the seconds.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jobs import sweep as job
from jobs.benchmarks import command
from unlearn import config
from unlearn.search import space, sweep_file
from unlearn.search.records import Trial

ALPHAS, SIZES = (0.05, 0.1, 0.25, 0.5), (50, 100, 200, 400)


def made(settings: config.RunConfig, folder: str, slots: int) -> space.Sweep:
    """The sweep of the benchmark, in `folder`."""
    return sweep_file.parse({
        "sweep_dir": folder, "run": settings.model_dump(mode="json", exclude_defaults=True),
        "set": {"cluster.workers": 1},
        "search": {"method.alpha": {"grid": list(ALPHAS)}, "data.forget.per_class": {"grid": list(SIZES)}},
        "objectives": {"retain.cosine.drop": "minimise", "forget.cosine.drop": "maximise"}, "search_by": "grid",
        "concurrent": slots, "tune_on": {"limit": settings.evaluation.limit},
    })  # fmt: skip


def alone(sweep: space.Sweep, trials: Sequence[Trial], folder: Path) -> list[float]:
    """Seconds of `unlearn run` of each trial's run, with a worker for each slot."""
    seconds = []
    for trial in trials:
        settings = sweep.of(trial.parameters, trial.seed, trial.model, trial.id)
        path = folder / f"{trial.id}.yaml"
        path.write_text(config.dump(settings.model_copy(update={"run_dir": str(folder / trial.id)})))
        began = time.perf_counter()
        workers = ["--set", f"cluster.workers={sweep.concurrent}"]
        subprocess.run([sys.executable, "-m", "unlearn", "run", str(path), *workers], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
        print(f"alone    {trial.id}  {seconds[-1]:6.1f} s")
    return seconds


def benchmark(settings: config.RunConfig, count: int, slots: int) -> None:
    """Run the sweep, then `count` of its runs alone, and print the ratio and the shares."""
    with tempfile.TemporaryDirectory(prefix="unlearn-benchmark-") as folder:
        sweep = made(settings, f"{folder}/sweep", slots)
        began = time.perf_counter()
        job.prepare(sweep)
        trials = job.sweep(sweep)
        total = time.perf_counter() - began
        for trial in trials:
            parts = "  ".join(f"{name} {seconds:6.2f} s" for name, seconds in trial.seconds.items())
            print(f"{'warm' if trial.warm else 'cold':8} {trial.id}  {sum(trial.seconds.values()):6.1f} s: {parts}")
        busy = {name: math.fsum(t.seconds.get(name, 0) for t in trials) for name in ("train", "measure")}
        one_by_one = statistics.mean(alone(sweep, trials[:: max(1, len(trials) // count)][:count], Path(folder))) * len(
            trials
        )
    cold, warm = ([sum(t.seconds.values()) for t in trials if t.warm == kind] for kind in (False, True))
    print(f"seconds a trial: cold {statistics.mean(cold):.1f}, warm {statistics.mean(warm):.1f}")
    print(
        f"{len(trials)} trials: {total:.0f} s as a sweep, {one_by_one:.0f} s one by one ({count} were run): {total / one_by_one:.2f} x"
    )
    print(
        f"training {busy['train'] / slots / total:.0%}, measuring {busy['measure'] / slots / total:.0%}, neither {1 - sum(busy.values()) / slots / total:.0%}"
    )


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--alone", type=int, default=4)
    parser.add_argument("--slots", type=int, default=2)
    options = parser.parse_args()
    command.main(
        "jobs.benchmarks.sweep",
        lambda: benchmark(
            command.settings(options, ["evaluation.limit=200", "training.steps=100"]), options.alone, options.slots
        ),
    )
