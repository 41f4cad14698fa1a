"""Slots: groups of Ray Train workers that stay, and take one leg of a trial after another from the desk.

Between trials a group keeps its process group, its imports, the images it has read, the teacher, the feature network,
and the figures of the original and the oracle. None of it changes a result: the weights of a trial are those of
`unlearn run`.
"""

import gc
import hashlib
import json
import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from jobs import evaluate
from jobs.desk import Leg
from unlearn import log as logs
from unlearn import signals
from unlearn.data.images import Images
from unlearn.data.loader import cut
from unlearn.errors import ClusterError, StorageError, UnlearnError
from unlearn.evaluation import comparison, measure
from unlearn.models import base
from unlearn.run import Run
from unlearn.search import objectives
from unlearn.training import ranks
from unlearn.training.checkpoint import Checkpoints
from unlearn.training.export import export
from unlearn.training.kept import Kept
from unlearn.training.loop import worker

log = logging.getLogger(__name__)

KNOWN = 8  # how many evaluations of an original a worker remembers: one for each seed, model and choice of classes


def work(settings: dict) -> None:
    """What each worker of a slot runs. settings: "desk", its handle; "slot", its number; "log", the level."""
    import warnings

    warnings.filterwarnings("ignore")
    import ray
    import ray.train

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    desk, slot, rank = settings["desk"], settings["slot"], ray.train.get_context().get_world_rank()
    logs.start_worker(settings["log"], rank=rank, slot=slot, host=socket.gethostname())
    signals.show_stacks()
    slot_worker = SlotWorker()

    def taken() -> tuple[Leg, Run] | str | None:
        leg: Any = ray.get(desk.next.remote(slot))
        return (leg, ray.get(leg.run[0])) if isinstance(leg, Leg) else leg

    while True:
        given = ranks.from_first(taken)
        if given is None:
            continue
        if isinstance(given, str):
            return
        leg, run = given
        report = (lambda row, id=leg.trial: desk.row.remote(slot, id, row)) if rank == 0 else (lambda row: None)
        try:
            outcome = slot_worker.leg(run, leg.until, report)
            if outcome is not None:
                ray.get(desk.measured.remote(slot, leg.trial, outcome))
        except UnlearnError as e:
            if isinstance(e, StorageError | ClusterError):  # may pass by itself: tried again
                ray.get(desk.trouble.remote(slot, leg.trial, str(e)))
                raise
            ray.get(desk.failed.remote(slot, leg.trial, str(e)))
            if ranks.grouped() and dist.get_world_size() > 1:
                raise  # the other workers may wait for this one: all of them start again, with the next trial
        except Exception as e:
            ray.get(desk.trouble.remote(slot, leg.trial, f"{type(e).__name__}: {e}"[:500]))
            raise
        del given, run
        gc.collect()  # the engine's cycles, with all that hangs on them


class SlotWorker:
    """One process of a slot, with what it keeps from trial to trial."""

    def __init__(self):
        self.kept, self.rank = Kept(targets=True), dist.get_rank() if ranks.grouped() else 0
        self._network: tuple[str, torch.nn.Module] | None = None
        self._known: OrderedDict[str, measure.Known] = OrderedDict()

    def leg(self, run: Run, until: int, report) -> dict[str, Any] | None:
        """Train a run until a step, on from its newest checkpoint, export its model and measure it. The outcome, on
        rank 0:

        {"step", "figures", "original", "oracle": {figure: value}, "seconds": {"start", "train", "measure", "other"},
        and of "training_seconds" those in all steps of the run}. metrics.json and the report are written at the end of
        the run.
        """
        began, last = time.perf_counter(), until == run.steps
        self._make_room(run)
        start = Checkpoints(run.folder, run.settings.training.keep_checkpoints).newest()
        clock = _Clock(start)

        def told(row: dict) -> None:
            clock.row(row, run.settings.training.batch_size)
            report(row)

        if start < until:
            worker(run, told, until, self.kept)
        trained = time.perf_counter()
        export(run)
        exported = time.perf_counter()
        found = self._measured(run, pictured=["retain"] if last else [])
        measured = time.perf_counter()
        if found is None:
            return None
        document, grids = found
        if last:
            evaluate.write(run, document, grids, measured - exported)
        figures = {name: objectives.of_document(document, name) for name in ("unlearned", "original", "oracle")}
        seconds = {"start": (clock.first or trained) - began, "train": clock.steps, "measure": measured - exported}
        seconds["other"] = time.perf_counter() - began - sum(seconds.values())
        return {
            "step": until, "figures": objectives.derived(figures["unlearned"], figures["original"], figures["oracle"]),
            "original": figures["original"], "oracle": figures["oracle"], "seconds": seconds,
            "training_seconds": evaluate.training_seconds(run),
        }  # fmt: skip

    def _make_room(self, run: Run) -> None:
        """Let go of images that this run does not need, where room is short."""
        settings = run.settings
        source = run.sources.get(settings.model.weights or "")
        size = base.options(settings.model, source.card.get("options") if source else None).image_size
        wanted: dict[Any, np.ndarray] = {}
        for sets, length in ((run.sets, cut(settings.data, size)), (run.measured, size)):
            for rows in sets.values():
                shelf = Images.shelf(rows, settings.data, length)
                wanted[shelf] = np.concatenate([wanted.get(shelf, rows.rows[:0]), rows.rows])
        self.kept.images(settings).make_room(wanted)

    def _measured(self, run: Run, pictured: list[str]) -> tuple[dict, list[dict]] | None:
        """What measure.evaluate gives, on rank 0; the other ranks do their share of it."""
        models = comparison.generators(run.settings)
        run = comparison.located(run, models)
        networks = ranks.from_first(lambda: measure.networks(run.settings))
        looking = self._looking(run, networks["features"])
        measurer = measure.Measurer(run, models, True, looking, self.kept.images(run.settings))
        if self.rank:
            return _serve(measurer)
        return measure.evaluate(
            run, models, lambda pieces: _shared(measurer, pieces), pictured, known=self._known_of(run, networks)
        )

    def _looking(self, run: Run, weights: str) -> torch.nn.Module:
        """The feature network. weights: their sha256."""
        evaluation = run.settings.evaluation
        key = repr((evaluation.features, weights, evaluation.resize, measure.device(run.settings)))
        if self._network is None or self._network[0] != key:
            self._network = key, measure.feature_network(run.settings)
        return self._network[1]

    def _known_of(self, run: Run, networks: dict[str, str]) -> measure.Known:
        """What is known of the original on the images of this run. networks: sha256 of what looks at them."""
        settings = run.settings
        digest = hashlib.sha256(json.dumps([
            settings.seed, settings.evaluation.model_dump(mode="json"), settings.model.model_dump(mode="json"),
            settings.training.threads, settings.data.orientation, networks,
            [run.origin.get("weights"), sorted(run.measured)],
        ], sort_keys=True).encode())  # fmt: skip
        for name in sorted(run.measured):
            digest.update(run.measured[name].manifest.hash.encode() + run.measured[name].rows.astype("<i8").tobytes())
        key = digest.hexdigest()
        self._known.setdefault(key, measure.Known())
        self._known.move_to_end(key)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return self._known[key]


class _Clock:
    """When the first step of a leg began, and how long its steps took, from the rows that are logged."""

    def __init__(self, step: int):
        """step: the one that the leg goes on from."""
        self._step, self.first, self.steps = step, None, 0.0

    def row(self, row: dict, batch_size: int) -> None:
        if "step" not in row:
            return
        seconds = (row["step"] - self._step) * batch_size / row["images_per_s"]
        self.first = self.first or time.perf_counter() - seconds
        self._step, self.steps = row["step"], self.steps + seconds


def _shared(measurer: measure.Measurer, pieces: Iterable[Any]) -> Iterator[Any]:
    """The results of pieces in their order, each rank doing its share; on rank 0, while the others `_serve`."""
    pieces = list(pieces)
    if not ranks.grouped():
        return map(measurer, pieces)
    dist.broadcast_object_list([pieces], src=0)
    shares: list = [None] * dist.get_world_size()
    dist.gather_object(_share(measurer, pieces), shares, dst=0)
    for good, result in shares:
        if not good:
            raise UnlearnError(result)
    return (shares[i % len(shares)][1][i // len(shares)] for i in range(len(pieces)))


def _serve(measurer: measure.Measurer) -> None:
    pieces: list = [None]
    dist.broadcast_object_list(pieces, src=0)
    dist.gather_object(_share(measurer, pieces[0]), dst=0)


def _share(measurer: measure.Measurer, pieces: list) -> tuple[bool, Any]:
    """(True, the results of this rank's pieces), or (False, the user's mistake that was met)."""
    try:
        return True, [measurer(piece) for piece in pieces[dist.get_rank() :: dist.get_world_size()]]
    except UnlearnError as e:
        return False, str(e)
