"""What each way to search finds with the same number of points: the volume that its front dominates.

    python -m jobs.benchmarks.searchers [CONFIG] [--set a.b=c] [--points 16] [--seeds 3] [--by grid random tpe nsga2]

Alpha and learning rate are searched, for little loss on the retain set and much on the forget set. Every point is
trained and measured in this process, one after the other; the trials are those of `unlearn sweep`. Volumes are relative
to a reference that is a tenth of the range worse than the worst of all points.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np

from jobs import sweep as job
from jobs.benchmarks import command
from jobs.benchmarks.here import played
from jobs.slots import SlotWorker
from unlearn import config
from unlearn.search import front, sweep_file
from unlearn.search.records import points

ALPHAS, RATES = (0.01, 1.0), (1e-4, 1e-2)


def domains(by: str, points: int) -> dict:
    """Ranges, or a grid over them that is even in their logarithms."""
    if by != "grid":
        return {"method.alpha": {"loguniform": list(ALPHAS)}, "training.lr": {"loguniform": list(RATES)}}
    side = round(points**0.5)
    alphas, rates = (np.geomspace(low, high, side).tolist() for low, high in (ALPHAS, RATES))
    return {"method.alpha": {"grid": alphas}, "training.lr": {"grid": rates}}


def searched(settings: config.RunConfig, by: str, seed: int, count: int, slot: SlotWorker) -> np.ndarray:
    """(N, 2) the losses of the points of one sweep, in their order."""
    with tempfile.TemporaryDirectory(prefix="unlearn-benchmark-") as folder:
        sweep = sweep_file.parse({
            "sweep_dir": f"{folder}/sweep", "run": settings.model_dump(mode="json", exclude_defaults=True),
            "search": domains(by, count), "search_by": by, "search_seed": seed, "budget": {"points": count},
            "objectives": {"retain.cosine.drop": "minimise", "forget.cosine.drop": "maximise"},
            "tune_on": {"limit": settings.evaluation.limit},
        })  # fmt: skip
        job.prepare(sweep)
        return front.table(points(played(sweep, slot, Path(folder))), sweep.wanted)[0]


def benchmark(settings: config.RunConfig, ways: list[str], count: int, seeds: int) -> None:
    slot, found = SlotWorker(), {}
    for by in ways:
        for seed in range(1 if by == "grid" else seeds):
            found[by, seed] = searched(settings, by, seed, count, slot)
            print(f"{by} {seed}: {len(found[by, seed])} points", flush=True)
    worst = front.reference(np.concatenate(list(found.values())))
    for by in ways:
        volumes = [front.hypervolume(losses, worst) for (way, _), losses in found.items() if way == by]
        print(f"{by:7} {statistics.mean(volumes):.5f} ({', '.join(f'{volume:.5f}' for volume in volumes)})")


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--by", nargs="+", default=["grid", "random", "tpe", "nsga2"])
    options = parser.parse_args()
    few = [
        "training.engine=torch", "cluster.workers=1", "training.steps=8", "training.warmup_steps=1",
        "training.schedule=constant", "evaluation.limit=16", "evaluation.views=[{size: 0.5}]",
        "training.checkpoint_every=1000",
    ]  # fmt: skip
    command.main(
        "jobs.benchmarks.searchers",
        lambda: benchmark(command.settings(options, few), options.by, options.points, options.seeds),
    )
