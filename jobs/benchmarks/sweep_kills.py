"""A sweep that is killed again and again beside one that nothing disturbs: same points, same figures, same weights.

    python -m jobs.benchmarks.sweep_kills [CONFIG] [--set a.b=c] [--kills 10] [--trials 12] [--seed 0] [--here]

Points are drawn at random, two trials work at one time. Each kill comes when a random number of steps is in
checkpoints, and is a SIGKILL of the driver, or of a worker, with equal chances. --here: the sweep is one process,
without Ray, see jobs/benchmarks/here.py; that process is killed.
"""

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from jobs.benchmarks import command
from unlearn import config
from unlearn.data.storage import Storage
from unlearn.search import space, sweep_file
from unlearn.search.records import Trial, Trials
from unlearn.training.checkpoint import Checkpoints


def made(settings: config.RunConfig, folder: Path, trials: int) -> space.Sweep:
    """The sweep, in `folder`."""
    return sweep_file.parse({
        "sweep_dir": str(folder), "run": settings.model_dump(mode="json", exclude_defaults=True),
        "set": {"cluster.max_failures": -1},
        "search": {"method.alpha": {"loguniform": [0.01, 1]}, "training.lr": {"loguniform": [1e-4, 1e-2]}},
        "objectives": {"retain.cosine.drop": "minimise", "forget.cosine.drop": "maximise"}, "search_by": "random",
        "budget": {"points": trials}, "concurrent": 2, "tune_on": {"limit": settings.evaluation.limit},
    })  # fmt: skip


def start(sweep: space.Sweep) -> subprocess.Popen:
    """The command that runs the sweep, or goes on with it."""
    path = Path(f"{sweep.sweep_dir}.yaml")
    path.write_text(sweep_file.dump(sweep))
    here = sweep.settings.training.engine == "torch"
    arguments = ["jobs.benchmarks.here"] if here else ["unlearn", "sweep"]
    return subprocess.Popen(
        [sys.executable, "-m", *arguments, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def ended(driver: subprocess.Popen) -> None:
    """Wait for its end. Raises RuntimeError where it has failed."""
    _, err = driver.communicate()
    if driver.returncode:
        raise RuntimeError(err[-2000:])


def done(sweep: space.Sweep) -> int:
    """Steps that are in checkpoints, of all trials."""
    folders = (f"{sweep.sweep_dir}/{trial.run}" for trial in Trials(Storage(sweep.sweep_dir)).all())
    return sum((Checkpoints(folder, 2).steps() or [0])[-1] for folder in folders)


def disturbed(sweep: space.Sweep, thresholds: list[int], rng: random.Random) -> None:
    """Run it to its end, and kill something at each of these numbers of steps."""
    driver = start(sweep)
    for threshold in thresholds:
        while driver.poll() is None and done(sweep) < threshold:
            time.sleep(0.1)
        if driver.poll() is not None:
            break
        below = psutil.Process(driver.pid).children(recursive=True)
        workers = [p for p in below if p.is_running() and "RayTrainWorker" in " ".join(p.cmdline())]
        if workers and rng.random() < 0.5:
            print(f"{done(sweep)} steps are saved: a worker is killed", flush=True)
            rng.choice(workers).kill()
        else:
            print(f"{done(sweep)} steps are saved: the driver is killed", flush=True)
            driver.kill()
            driver.communicate()
            psutil.wait_procs([p for p in below if "Agent" not in p.name()], timeout=120)
            driver = start(sweep)
    ended(driver)


def outcome(sweep: space.Sweep) -> list[tuple[Trial, str]]:
    """(a record without what a clock has measured, the hash of the weights) of every trial."""

    def timeless(figures: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in figures.items() if name != "cost.seconds"}

    found = []
    for trial in Trials(Storage(sweep.sweep_dir)).all():
        weights = Storage(sweep.sweep_dir).read(f"{trial.run}/model/weights.safetensors")
        stages = [stage | {"figures": timeless(stage["figures"])} for stage in trial.stages]
        trial = replace(trial, figures=timeless(trial.figures), stages=stages, seconds={}, slot=None, warm=False)
        found.append((replace(trial, started="", ended=""), hashlib.sha256(weights).hexdigest()))
    return found


def benchmark(settings: config.RunConfig, kills: int, trials: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="unlearn-benchmark-") as folder:
        plain, killed = (made(settings, Path(folder, name), trials) for name in ("undisturbed", "killed"))
        ended(start(plain))
        saved = [*range(settings.training.checkpoint_every, done(plain), settings.training.checkpoint_every)]
        disturbed(killed, sorted(rng.sample(saved, kills)), rng)
        pairs = list(zip(outcome(plain), outcome(killed), strict=True))
    for what, part in (("points and figures", 0), ("weights", 1)):
        print(f"{what}: {sum(one[part] == other[part] for one, other in pairs)} of {len(pairs)} trials are the same")


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true")
    options = parser.parse_args()
    few = [
        *(["training.engine=torch"] if options.here else []), "cluster.workers=1",
        "evaluation.limit=10", "evaluation.views=[{size: 0.5}]", "training.steps=20", "training.checkpoint_every=5",
        "training.warmup_steps=2",
    ]  # fmt: skip
    command.main(
        "jobs.benchmarks.sweep_kills",
        lambda: benchmark(command.settings(options, few), options.kills, options.trials, options.seed),
    )
