"""The loader without a cache against the bare decoder with as many threads: images/s of the same images.

python -m jobs.benchmarks.loader [CONFIG] [--set a.b=c] [--rounds 3]
"""

import time
from concurrent.futures import ThreadPoolExecutor

from jobs.benchmarks import command
from unlearn import config
from unlearn.data.decode import decode
from unlearn.data.loader import Loader
from unlearn.data.scaling import fit
from unlearn.models import weights
from unlearn.run import resolve


def loader(settings: config.RunConfig, rounds: int, batches: int = 100) -> None:
    """Images/s of the loader without a cache, and of decoding alone the same images with as many threads."""
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"cache": "none"})})
    found, model = resolve(settings).sets, weights.build(settings.model, settings.seed)
    size = model.options.image_size
    rates: dict[str, list[float]] = {"loader": [], "decoder": []}
    for round in range(rounds + 1):
        source = Loader(settings, found, model.grid, size)
        began = time.perf_counter()
        count = sum(len(b.images) for b in source.batches(range(batches)))
        rate = {"loader": count / (time.perf_counter() - began)}
        encoded = []
        for number in range(batches):
            for name, stream in source.streams.items():
                each = getattr(source, name)
                encoded += [source.images[name].read(row) for row in stream.take(number * each, each).tolist()]
        began = time.perf_counter()
        with ThreadPoolExecutor(settings.data.decode_threads) as pool:
            # In runs as long as a micro-batch, so that handing over work costs as little as in the loader.
            parts = [encoded[i : i + settings.micro_batch] for i in range(0, count, settings.micro_batch)]
            list(pool.map(lambda part: [fit(decode(data), size) for data in part], parts))
        rate["decoder"] = count / (time.perf_counter() - began)
        if round:
            for name, value in rate.items():
                rates[name].append(value)
                print(f"round {round}  {name:8} {value:8.0f} images/s")
    command.tell_ratio("loader / bare decoder", rates["loader"], rates["decoder"])


if __name__ == "__main__":
    options = command.parser(__doc__).parse_args()
    command.main("jobs.benchmarks.loader", lambda: loader(command.settings(options), options.rounds))
