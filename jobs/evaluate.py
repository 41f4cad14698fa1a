"""Evaluate: what the generators of a run make of the forget and the retain set; behind `unlearn evaluate` and `unlearn report`.

Writes metrics.json and report.html into the run folder. metrics.json:

    software, name, config_hash      what was run
    features                         name of the feature network; figures of different networks cannot be compared
    views, generators                names, in the order of the tables; the first view is the main one
    sets                             {set: {images, classes, manifest (sha256), split: "held-out" | "training", bad_images}}
    rows                             [{generator, set, view, images, fid, is, is_std, cosine, cosine_std, psnr}]: fid against
                                     the set's own originals; is and is_std over ten splits; cosine of each reconstruction's
                                     features to its original's, mean and standard deviation; psnr in dB, inside the hole
                                     alone; null where a figure cannot be given
    notes                            sentences a reader of the figures must know
    seconds                          worker time by stage, and the whole by the clock
    training_seconds                 time in training steps, from metrics.jsonl; null without it

No image, no id and no embedding of the sets is in it.
"""

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unlearn import __version__, config
from unlearn.data import selection, shards
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError, UnlearnError

METRICS = "metrics.json"
AHEAD = 4  # batches each worker has waiting, so that it works on while the driver computes a row
RETRIES = 3  # of a worker that dies

# Called with (images done, images in all); an image counts once for itself, and once a generator and view.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Piece:
    """One piece of work: positions start .. stop of a set; generator None: the originals themselves."""

    set: str
    generator: str | None
    view: int
    start: int
    stop: int


def evaluate(run: config.RunConfig, progress: Progress = lambda done, total: None, show_forget: bool = False) -> dict:
    """Measure every generator on every set under every view; write metrics.json and the report. Returns what is in metrics.json.

    The figures do not depend on the number of workers. Raises UnlearnError.
    """
    from unlearn.evaluation import pictures

    began = time.perf_counter()
    sets, generators = pictures.sets(run), list(pictures.generators(run))
    with _workers(run) as measure:
        rows, kept, seconds = _rows(run, {name: len(s) for name, s in sets.items()}, generators, measure, progress)
    train = shards.load(run.data.train).hash
    document = {
        "software": f"unlearn {__version__}", "name": run.name, "config_hash": run.hash(),
        "features": run.evaluation.features, "views": [view.name for view in run.evaluation.views], "generators": generators,
        "sets": {
            name: described | {
                "split": "held-out" if run.evaluation.data and described["manifest"] != train else "training",
                "bad_images": len(sets[name]) - kept[name],
            }
            for name, described in selection.describe(sets).items()
        },
        "rows": rows,
    }  # fmt: skip
    document["notes"] = _notes(run, document)
    document["seconds"] = {k: round(v, 3) for k, v in seconds.items()} | {"total": round(time.perf_counter() - began, 3)}
    document["training_seconds"] = _training_seconds(run)
    Storage(run.run_dir).write(METRICS, json.dumps(document, indent=1, allow_nan=False).encode())
    report(run, show_forget)
    return document


def report(run: config.RunConfig, show_forget: bool = False) -> str:
    """Write report.html from metrics.json and the run's records, pictures made anew. Returns its URI.

    Pictures of forget images only with `show_forget`: the file then holds what was to be forgotten. Raises UnlearnError.
    """
    from unlearn.evaluation import report

    storage = Storage(run.run_dir)
    if not storage.is_file(METRICS):
        raise UnlearnError(f"{run.run_dir} has no {METRICS}: run `unlearn evaluate` first")
    return report.write(run, json.loads(storage.read(METRICS)), show_forget)


class Worker:
    """Loads the images, the generators and the feature network once, then measures batch after batch."""

    def __init__(self, run: config.RunConfig):
        import torch

        from unlearn.evaluation import features
        from unlearn.evaluation.pictures import Comparison

        torch.set_num_threads(run.training.threads)
        device = "cuda" if run.cluster.gpus_per_worker else "cpu"
        self.compared = Comparison(run, device)
        self.network = features.build(run.evaluation.features, run.evaluation.features_weights).to(device)

    def measure(self, batch: Piece) -> dict:
        """{"features": (B, D), "classes": (B, C) or None, "errors": (B,) squared error in the hole, or None, "seconds"}."""
        import numpy as np

        from unlearn.evaluation.metrics import hole_errors

        began, errors = time.perf_counter(), None
        kept, pixels = self.compared.pixels(batch.set, np.arange(batch.start, batch.stop))
        images = pixels.float() / 255
        if not len(images):
            return {"features": images.new_empty(0, 0), "classes": None, "errors": None, "seconds": 0.0}
        if batch.generator:
            view = self.compared.view(batch.set, batch.view, kept)
            made = self.compared.reconstruct(batch.generator, pixels, view)
            errors = hole_errors(made, images, view.pixel_mask(self.compared.size)).cpu()
            images = made
        found, classes = self.network(images)
        classes = classes if classes is None else classes.cpu()
        return {"features": found.cpu(), "classes": classes, "errors": errors, "seconds": time.perf_counter() - began}


def _rows(run, sizes: dict[str, int], generators: list[str], measure, progress: Progress):
    """(rows of metrics.json, images measured by set, seconds by stage): set by set, so that few features are in memory."""
    from unlearn.evaluation.metrics import scores

    views = range(len(run.evaluation.views))
    cells = [(s, g, v) for s in sizes for g, v in [(None, 0), *((g, v) for v in views for g in generators)]]
    step = run.evaluation.batch_size
    batches = [Piece(s, g, v, i, min(i + step, sizes[s])) for s, g, v in cells for i in range(0, sizes[s], step)]
    total, done = sum(b.stop - b.start for b in batches), 0
    rows, kept, seconds, real = [], {}, {"originals": 0.0} | dict.fromkeys([*generators, "figures"], 0.0), None
    results = measure(batches)
    for name, generator, view in cells:
        parts = []
        for start in range(0, sizes[name], step):
            parts.append(next(results))
            done += min(step, sizes[name] - start)
            progress(done, total)
        seconds[generator or "originals"] += sum(part["seconds"] for part in parts)
        began = time.perf_counter()
        if generator is None:
            real, _, _ = _joined(parts)
            kept[name] = 0 if real is None else len(real)
            if real is None:
                raise UnlearnError(f"no image of the {name} set decodes: nothing to measure")
        else:
            row = {"generator": generator, "set": name, "view": run.evaluation.views[view].name}
            made, classes, errors = _joined(parts)
            rows.append(row | scores(real, made, classes, errors, run.seed))
        seconds["figures"] += time.perf_counter() - began
    return rows, kept, seconds


def _joined(parts: list[dict]) -> tuple:
    """Features, class scores and errors of all batches, in order, or None; a batch of damaged images alone adds nothing."""
    import torch

    columns = ([p[key] for p in parts if len(p["features"])] for key in ("features", "classes", "errors"))
    return tuple(torch.cat(column) if column and column[0] is not None else None for column in columns)


@contextlib.contextmanager
def _workers(run: config.RunConfig) -> Iterator[Callable[[list[Piece]], Iterator[dict]]]:
    """A function that measures batches and yields the results in their order: in this process, or in Ray actors."""
    count = run.evaluation.workers or run.cluster.workers
    if count == 1 and (run.training.engine == "torch" or not _on_cluster(run)):
        import torch

        threads = torch.get_num_threads()
        try:
            worker = Worker(run)
            yield lambda batches: map(worker.measure, batches)
        finally:
            torch.set_num_threads(threads)
        return

    from jobs.cluster import connected, room

    # A run that goes on with fewer workers is measured with fewer: the figures are the same.
    with connected(run.cluster, min(count, run.cluster.min_workers or count)):
        import ray

        count = min(count, room(run.cluster))
        cpus, gpus = run.cluster.cpus_per_worker, run.cluster.gpus_per_worker
        kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=RETRIES, max_task_retries=RETRIES)(_Actor)
        actors = [kind.remote(run.model_dump(mode="json")) for _ in range(count)]
        try:
            yield lambda batches: _in_order(actors, batches)
        finally:
            for actor in actors:
                ray.kill(actor)


def _on_cluster(run: config.RunConfig) -> bool:
    import os

    ray = sys.modules.get("ray")
    return bool(run.cluster.address or os.environ.get("RAY_ADDRESS") or (ray and ray.is_initialized()))


class _Actor:
    """A Worker in a process of its own. A mistake of the user comes back as its text, to be told once and not retried."""

    def __init__(self, settings: dict):
        self.settings, self.worker = settings, None

    def measure(self, batch: Piece) -> dict | str:
        try:
            self.worker = self.worker or Worker(config.parse(self.settings))
            return self.worker.measure(batch)
        except UnlearnError as e:
            return str(e)


def _in_order(actors: list, batches: list[Piece]) -> Iterator[dict]:
    ahead: deque = deque()
    for number, batch in enumerate(batches):
        ahead.append(actors[number % len(actors)].measure.remote(batch))
        if len(ahead) == AHEAD * len(actors):
            yield _result(ahead.popleft())
    while ahead:
        yield _result(ahead.popleft())


def _result(future) -> dict:
    import ray

    try:
        result = ray.get(future)
    except ray.exceptions.RayActorError as e:
        told = str(e).splitlines()[0][:160]
        raise ClusterError(f"a worker died more than {RETRIES} times: {told}; it may need more memory") from None
    if isinstance(result, str):
        raise UnlearnError(result)
    return result


def _notes(run: config.RunConfig, document: dict) -> list[str]:
    from unlearn.evaluation.metrics import STABLE

    notes = []
    measured = {name: found["images"] - found["bad_images"] for name, found in document["sets"].items()}
    if min(measured.values()) < STABLE:
        told = ", ".join(f"{count:,} images of the {name} set" for name, count in measured.items())
        notes.append(
            f"FID rests on {told}. Fewer than {STABLE:,} are too few for a covariance: the value is biased upwards and only "
            "indicates. Compare it within this table, not with other work."
        )
    for name, found in document["sets"].items():
        if found["split"] == "training":
            why = "held-out shards have no such rows" if run.evaluation.data else "evaluation.data names no held-out ones"
            notes.append(f"The {name} set is measured on training images: {why}.")
        if found["bad_images"]:
            notes.append(f"{found['bad_images']} damaged image(s) of the {name} set were left out.")
    if any(row["is"] is None for row in document["rows"]):
        notes.append(f"{document['features']} has no class scores: no Inception Score.")
    elif document["features"] != "inception":
        notes.append(
            f"FID and IS are computed with {document['features']}, not with the Inception network of the literature: compare "
            "them within this report alone."
        )
    return notes


def _training_seconds(run: config.RunConfig) -> float | None:
    """Seconds in training steps, from the logged rates: each row tells of the steps since the one before."""
    from unlearn.training import metrics

    rows = metrics.read(run.run_dir)
    steps = [row["step"] - before["step"] for row, before in zip(rows, [{"step": 0}, *rows], strict=False)]
    times = [n * run.training.batch_size / row["images_per_s"] for n, row in zip(steps, rows, strict=True)]
    return round(sum(times), 1) if rows else None


if __name__ == "__main__":
    from unlearn.cli import main

    main(["evaluate", *sys.argv[1:]])
