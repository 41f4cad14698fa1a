"""The loader against the bare decoder with as many threads, and against the usual way, which scales by PIL: images of the same rows
a second of processor time, which other work on the machine does not change much.

first   an epoch that reads and decodes (data.cache none); cached   an epoch whose images are kept decoded and cut to size
bare    decoding and scaling alone; pil   the same, scaled by PIL

python -m jobs.benchmarks.loader [CONFIG] [--set a.b=c] [--rounds 3]
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from jobs.benchmarks import command
from unlearn import config
from unlearn.data.decode import decode
from unlearn.data.loader import Loader
from unlearn.data.scaling import fit
from unlearn.models import weights
from unlearn.run import resolve


def loader(settings: config.RunConfig, rounds: int, images: int = 3000) -> None:
    """Print the rates of each round, and their ratios."""
    model = weights.build(settings.model, settings.seed)
    size, batches = model.options.image_size, range(-(-images // settings.micro_batch))

    def made(cache: str) -> Loader:
        data = settings.data.model_copy(update={"cache": cache})
        changed = settings.model_copy(update={"data": data})
        return Loader(changed, resolve(changed).sets, model.grid, size)

    kept, rates = made("decoded"), {"first": [], "cached": [], "bare": [], "pil": []}
    _rate(lambda: kept.batches(batches))
    for round in range(rounds + 1):
        source = made("none")
        encoded = [
            [source.images[name].read(row) for name, row in source.rows(number)] for number in batches
        ]  # as many at a time as the loader hands to a thread
        rate = {
            "first": _rate(lambda source=source: source.batches(batches)),
            "cached": _rate(lambda: kept.batches(batches)),
            "bare": _rate(lambda encoded=encoded: _decoded(settings, encoded, lambda image: fit(image, size))),
            "pil": _rate(lambda encoded=encoded: _decoded(settings, encoded, lambda image: _by_pil(image, size))),
        }
        if round:
            for name, value in rate.items():
                rates[name].append(value)
            print(f"round {round}  " + "  ".join(f"{name} {value:,.0f}" for name, value in rate.items()))
    for one, other in (("first", "bare"), ("first", "pil"), ("cached", "pil")):
        command.tell_ratio(f"{one} / {other}", rates[one], rates[other])


def _rate(make: Callable[[], Iterable]) -> float:
    """Images a second of processor time of all threads. make() -> batches of images."""
    began = time.process_time()
    count = sum(len(batch if isinstance(batch, list) else batch.images) for batch in make())
    return count / (time.process_time() - began)


def _decoded(settings: config.RunConfig, encoded: list[list], scale: Callable[[np.ndarray], np.ndarray]) -> list:
    with ThreadPoolExecutor(settings.data.decode_threads) as pool:
        return list(pool.map(lambda part: [scale(decode(data)) for data in part], encoded))


def _by_pil(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = size / min(height, width)
    wide, high = round(width * scale), round(height * scale)
    scaled = Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


if __name__ == "__main__":
    options = command.parser(__doc__).parse_args()
    command.main("jobs.benchmarks.loader", lambda: loader(command.settings(options), options.rounds))
