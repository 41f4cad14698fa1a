"""The loader against the bare decoder with as many threads, and against the usual way, which scales by PIL: images of
the same rows a second of processor time, which other work on the machine does not change much.

first   an epoch that reads and decodes (data.cache none)    cached   one whose images are kept decoded and cut to size
bare    decoding and scaling alone; pil   the same, scaled by PIL
crc     the checksum by which stored images are compared with the manifest: first / crc is its share of an epoch

With --cached, instead: how many images a second a step could be given at most, in the epoch that fills the cache of
decoded images and in those from it, and how long each stage took, of which it waited for the disk, the network, a lock
or a core.

python -m jobs.benchmarks.loader [CONFIG] [--set a.b=c] [--rounds 3] [--cached]
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from PIL import Image

from jobs.benchmarks import command
from unlearn import config
from unlearn.data import cache
from unlearn.data.columns import checksum
from unlearn.data.decode import decode
from unlearn.data.images import Images
from unlearn.data.loader import Batch, Loader, cut
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

    kept, rates = made("decoded"), {"first": [], "cached": [], "bare": [], "pil": [], "crc": []}
    _rate(lambda: kept.batches(batches))
    for round in range(rounds + 1):
        source = made("none")
        encoded = [
            [source.images[name].read(row) for name, row in source.rows(number)] for number in batches
        ]  # as many at a time as the loader hands to a thread
        chunks = [pa.array(map(bytes, batch), pa.large_binary()) for batch in encoded]
        rate = {
            "first": _rate(lambda source=source: source.batches(batches)),
            "cached": _rate(lambda: kept.batches(batches)),
            "bare": _rate(lambda encoded=encoded: _decoded(settings, encoded, lambda image: fit(image, size))),
            "pil": _rate(lambda encoded=encoded: _decoded(settings, encoded, lambda image: _by_pil(image, size))),
            "crc": _rate(lambda chunks=chunks: [[checksum([chunk])] * len(chunk) for chunk in chunks]),
        }
        if round:
            for name, value in rate.items():
                rates[name].append(value)
            print(f"round {round}  " + "  ".join(f"{name} {value:,.0f}" for name, value in rate.items()))
    for one, other in (("first", "bare"), ("first", "pil"), ("cached", "pil"), ("first", "crc")):
        command.tell_ratio(f"{one} / {other}", rates[one], rates[other])


def _rate(make: Callable[[], Iterable]) -> float:
    """Images a second of processor time of all threads. make() -> batches of images."""
    began = time.process_time()
    count = sum(len(batch if isinstance(batch, list) else batch.images) for batch in make())
    return count / (time.process_time() - began)


class Stages:
    """How long each stage of the loader took, in all threads together: by the clock, and in processor time."""

    def __init__(self):
        self.clock: dict[str, float] = defaultdict(float)
        self.processor: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began, used = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self.clock[name] += time.perf_counter() - began
                self.processor[name] += time.thread_time() - used


class TimedImages(Images):
    """Images whose stages are timed."""

    stages: Stages

    def _row_group(self, group: int):
        with self.stages.stage("read"):
            return super()._row_group(group)

    def _decode(self, stored: bytes | memoryview) -> np.ndarray:
        with self.stages.stage("decode"):
            return super()._decode(stored)

    def _fit(self, image: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        with self.stages.stage("scale"):
            return super()._fit(image, out)


class TimedLoader(Loader):
    """A loader whose stages are timed: "assemble" is what is left of making a batch, which copies the pixels to where
    they stay."""

    stages: Stages

    def batch(self, number: int, pin: bool = False) -> Batch:
        with self.stages.stage("batch"):
            return super().batch(number, pin)


def ceiling(settings: config.RunConfig, rounds: int, images: int = 3000) -> None:
    """Print how fast batches are made while nobody uses them, and the stages."""
    model = weights.build(settings.model, settings.seed)
    size, batches = model.options.image_size, range(-(-images // settings.micro_batch))
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"cache": "decoded"})})
    sets, kept = resolve(settings).sets, cache.image_cache(settings.data, settings.cluster.workers)
    loader = TimedLoader(settings, sets, model.grid, size, kept=kept)
    timed = {name: TimedImages(rows, settings.data, kept, cut(settings.data, size)) for name, rows in sets.items()}
    loader.images = dict(timed)
    for round in range(rounds + 1):
        stages = loader.stages = Stages()
        for each in timed.values():
            each.stages = stages
        began, used, count, made = time.perf_counter(), time.process_time(), 0, loader.batches(batches)
        while True:
            with stages.stage("wait for a batch"):
                batch = next(made, None)
            if batch is None:
                break
            count += len(batch.images)
        seconds, used = time.perf_counter() - began, time.process_time() - used
        what = f"epoch {round + 1}, from the cache" if round else "epoch 1, read and decoded"
        rate, worked = count / seconds, count / used
        print(f"{what}: {rate:,.0f} images/s, {worked:,.0f} a second of processor time; ms for 1,000 images:")
        for figures in (stages.clock, stages.processor):
            figures["assemble"] = figures.pop("batch") - sum(figures[name] for name in ("read", "decode", "scale"))
        for name in ("read", "decode", "scale", "assemble", "wait for a batch"):
            clock, processor = (1e6 * figures[name] / count for figures in (stages.clock, stages.processor))
            print(f"  {name:17} {clock:8,.1f}, of which waited {max(clock - processor, 0):8,.1f}")


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
    parser = command.parser(__doc__)
    parser.add_argument("--cached", action="store_true")
    options = parser.parse_args()
    measured = ceiling if options.cached else loader
    command.main("jobs.benchmarks.loader", lambda: measured(command.settings(options), options.rounds))
