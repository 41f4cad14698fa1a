"""Ray Train + DeepSpeed against the plain torch engine: images/s of the same batches.

python -m jobs.benchmarks.engines [CONFIG] [--set a.b=c] [--rounds 3]
"""

import statistics
import tempfile

from jobs.benchmarks import command
from jobs.cluster import connected
from jobs.train import prepare, train
from unlearn import config
from unlearn.training import metrics


def engines(settings: config.RunConfig, rounds: int) -> None:
    """Images/s in steady state of the same batches: the run as it is, and on plain torch with as many threads as the
    run has workers, in turn."""
    plain = {
        "training": {"engine": "torch", "threads": settings.cluster.workers, "micro_batch_size": settings.micro_batch},
        "cluster": {"workers": 1},
    }
    rates: dict[str, list[float]] = {"plain torch": [], "Ray + DeepSpeed": []}
    with connected(settings.cluster, settings.cluster.workers), tempfile.TemporaryDirectory() as folder:
        for round in range(rounds + 1):
            for name, change in (("plain torch", plain), ("Ray + DeepSpeed", {})):
                tree = settings.model_dump(mode="json") | {"run_dir": f"{folder}/{round}-{name}"}
                for part, values in change.items():
                    tree[part] = tree[part] | values
                one = config.parse(tree)
                train(prepare(one))
                rows = metrics.read(one.run_dir)
                steady = [row["images_per_s"] for row in rows[len(rows) // 4 :]]
                if round:  # the first is the warm-up
                    rates[name].append(statistics.median(steady))
                    print(f"round {round}  {name:16} {rates[name][-1]:8.1f} images/s")
    command.tell_ratio("Ray + DeepSpeed / plain torch", rates["Ray + DeepSpeed"], rates["plain torch"])


if __name__ == "__main__":
    options = command.parser(__doc__).parse_args()
    command.main("jobs.benchmarks.engines", lambda: engines(command.settings(options), options.rounds))
