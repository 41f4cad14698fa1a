"""How near the software is to its floor. Ratios within one run; absolute figures belong to the machine.

    python -m jobs.benchmark engines [CONFIG] [--set a.b=c]   Ray Train + DeepSpeed against the plain torch engine
    python -m jobs.benchmark loader  [CONFIG] [--set a.b=c]   the loader against the bare decoder
    python -m jobs.benchmark step    [CONFIG] [--set a.b=c]   a step of the plain engine against a bare PyTorch loop; on a GPU
                                                              also the share of its peak. --model mae/vit_large_patch16: a
                                                              named shape with random weights and images
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from jobs import demo
from jobs.cluster import WORKER_ENV
from unlearn import config
from unlearn.errors import UnlearnError


def engines(run: config.RunConfig, rounds: int) -> None:
    """Images/s in steady state of the same batches: the run as it is, and on plain torch with as many threads as the run
    has workers, in turn."""
    from jobs.cluster import connected
    from jobs.train import train
    from unlearn.training import metrics

    plain = {"training": {"engine": "torch", "threads": run.cluster.workers, "micro_batch_size": run.micro_batch}, "cluster": {"workers": 1}}
    rates: dict[str, list[float]] = {"plain torch": [], "Ray + DeepSpeed": []}
    with connected(run.cluster, run.cluster.workers), tempfile.TemporaryDirectory() as folder:
        for round in range(rounds + 1):
            for name, change in (("plain torch", plain), ("Ray + DeepSpeed", {})):
                tree = run.model_dump(mode="json") | {"run_dir": f"{folder}/{round}-{name}"}
                for part, values in change.items():
                    tree[part] = tree[part] | values
                one = config.parse(tree)
                train(one)
                rows = metrics.read(one.run_dir)
                steady = [row["images_per_s"] for row in rows[len(rows) // 4 :]]
                if round:  # the first is the warm-up
                    rates[name].append(statistics.median(steady))
                    print(f"round {round}  {name:16} {rates[name][-1]:8.1f} images/s")
    _ratio("Ray + DeepSpeed / plain torch", rates["Ray + DeepSpeed"], rates["plain torch"])


def loader(run: config.RunConfig, rounds: int, batches: int = 100) -> None:
    """Images/s of the loader without a cache, and of decoding alone the same images with as many threads."""
    from unlearn.data.loader import Loader, decode, fit
    from unlearn.models import weights
    from unlearn.training import loop

    run = run.model_copy(update={"data": run.data.model_copy(update={"cache": "none"})})
    found, model = loop.sets(run), weights.build(run.model, run.seed)
    size = model.options.image_size
    rates: dict[str, list[float]] = {"loader": [], "decoder": []}
    for round in range(rounds + 1):
        source = Loader(run, found, model.grid, size)
        began = time.perf_counter()
        count = sum(len(b.images) for b in source.batches(range(batches)))
        rate = {"loader": count / (time.perf_counter() - began)}
        encoded = []
        for number in range(batches):
            for name, stream in source.streams.items():
                each = getattr(source, name)
                encoded += [source.images[name]._encoded(row) for row in stream.take(number * each, each).tolist()]
        began = time.perf_counter()
        with ThreadPoolExecutor(run.data.decode_threads) as pool:
            # In runs as long as a micro-batch, so that handing over work costs as little as in the loader.
            parts = [encoded[i : i + run.micro_batch] for i in range(0, count, run.micro_batch)]
            list(pool.map(lambda part: [fit(decode(data), size) for data in part], parts))
        rate["decoder"] = count / (time.perf_counter() - began)
        if round:
            for name, value in rate.items():
                rates[name].append(value)
                print(f"round {round}  {name:8} {value:8.0f} images/s")
    _ratio("loader / bare decoder", rates["loader"], rates["decoder"])


def _ratio(what: str, mine: list[float], base: list[float]) -> None:
    ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
    print(f"{what}: {statistics.median(ratios):.2f} (median of {len(ratios)} rounds, {ratios[0]:.2f} to {ratios[-1]:.2f})")


def _one_worker(options: argparse.Namespace) -> list[str]:
    """Overrides for a step of one process: those of the command line come after them."""
    import torch

    found = ["training.engine=torch", "cluster.workers=1"]
    if options.model:
        family, _, variant = options.model.partition("/")
        found += [f"model={{family: {family}, variant: {variant or 'null'}}}", "train_views=[{kind: random, size: 0.75}]"]
    if torch.cuda.is_available():
        found += ["training.dtype=bf16", "cluster.gpus_per_worker=1"]
    rows = options.micro_batch
    return found + ([f"training.micro_batch_size={rows}", f"training.batch_size={rows}"] if rows else [])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["engines", "loader", "step"])
    parser.add_argument("config", nargs="?", help="a YAML file; default: the demo's configuration")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    steps = parser.add_argument_group("step")
    steps.add_argument("--model", metavar="FAMILY/VARIANT")
    steps.add_argument("--micro-batch", type=int, metavar="ROWS", help="of one step; default: the config's")
    steps.add_argument("--warm-up", type=int, default=3, metavar="STEPS")
    steps.add_argument("--seconds", type=float, default=2, help="of each round")
    steps.add_argument("--compile", action="store_true", help="torch.compile on both encoders")
    steps.add_argument("--channels-last", action="store_true")
    options = parser.parse_args(argv)
    if not WORKER_ENV.items() <= os.environ.items():
        # What Ray's workers are given, plain torch must have too, or it would be no fair baseline; malloc reads it at start.
        os.execve(sys.executable, [sys.executable, "-m", "jobs.benchmark", *(argv or sys.argv[1:])], os.environ | WORKER_ENV)
    try:
        overrides = (_one_worker(options) if options.what == "step" else []) + options.overrides
        run = config.load(options.config, overrides) if options.config else demo.demo_config(overrides=overrides)
        if options.what == "step":
            from jobs.benchmark_step import step

            step(run, options.rounds, options.seconds, options.warm_up, options.compile, options.channels_last, options.model is not None)
        else:
            (engines if options.what == "engines" else loader)(run, options.rounds)
    except UnlearnError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
