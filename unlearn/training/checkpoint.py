"""Checkpoints: each rank's fragments as safetensors, and a COMMIT file written last.

    checkpoints/step-00000100/rank-00000-of-00002.safetensors    tensors "KIND/START/NAME", flat, float32
                              method.safetensors                 what the method remembers, where it does
                              COMMIT                             JSON: trainer state, size and sha256 of every file

A folder without COMMIT is not a checkpoint. The files do not depend on the world size: any number of ranks reads what
any number wrote.
Other files there are not touched.
"""

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from unlearn import documents
from unlearn.aliases import first_hash, tensor_name
from unlearn.data.node_cache import node_copy, release
from unlearn.data.s3 import Facts
from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError
from unlearn.models import tensor_files
from unlearn.run import Run
from unlearn.training import ranks
from unlearn.training.fragments import OPTIMIZER_STATE, Fragment

COMMIT, METHOD = "COMMIT", "method.safetensors"
AVERAGE = "ema"  # the moving average of the weights, among the tensors of a rank
_STEP = re.compile(r"checkpoints/(step-(\d{8,}))/(.+)")
_FRAGMENTS = re.compile(r"rank-\d{5,}-of-\d{5,}\.safetensors")


@dataclass(frozen=True)
class TrainerState:
    """The trainer's state beside weights, optimizer and method: order, views and noise are functions of the step."""

    step: int
    samples: int
    config: str  # RunConfig.hash(step)
    data: dict[str, str]  # set -> manifest hash, and "weights" -> sha256 of what training started from
    workers: int

    def check(self, run: Run, where: str) -> None:
        """Raise CheckpointError where the run to be continued is another one."""
        now = run.settings.hash(self.step)
        if self.config not in (now, first_hash(run.settings)):
            raise CheckpointError(
                f"{where} was written with another config (hash {self.config[:12]}, now {now[:12]}): "
                "resume with the config of the run, or start a new run_dir"
            )
        data = {"first_stage" if name == "front" else name: value for name, value in self.data.items()}
        if data != run.origin:
            changed = ", ".join(name for name in data | run.origin if data.get(name) != run.origin.get(name))
            raise CheckpointError(f"{where}: the data has changed since ({changed}); start a new run_dir")


@dataclass(frozen=True)
class Commit:
    """What COMMIT says. files: name -> (bytes, sha256)."""

    state: TrainerState
    files: dict[str, tuple[int, str]]


class Checkpoints:
    """The checkpoints of one run. keep: how many of the newest stay."""

    def __init__(self, run_dir: str, keep: int):
        self.storage, self.keep = Storage(run_dir), keep

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(step for step, names in self._listed().items() if COMMIT in names)

    def newest(self) -> int:
        """The newest step as rank 0 sees it, on every rank; 0 where there is none."""
        return ranks.from_first(lambda: (self.steps() or [0])[-1])

    def state(self, step: int) -> TrainerState:
        return self._commit(step).state

    def save(
        self, fragments: list[Fragment], state: TrainerState, rank: int, gather: Callable[[object], list],
        method: dict[str, torch.Tensor] | None = None, average: Sequence[Fragment] = (),
    ) -> None:  # fmt: skip
        """Write this rank's fragments; rank 0 commits when all have. `gather` collects one object from every rank.

        method: what the method remembers, the same on all ranks. average: this rank's pieces of the moving average.
        """
        fragments = [f for f in fragments if rank == 0 or not f.replicated]
        tensors = {f"weights/{f.start}/{f.name}": f.master() for f in fragments}
        for kind in OPTIMIZER_STATE:
            tensors |= {f"{kind}/{f.start}/{f.name}": f.state(kind) for f in fragments}
        tensors |= {f"{AVERAGE}/{f.start}/{f.name}": f.master() for f in average if rank == 0 or not f.replicated}
        written = self._write(state.step, f"rank-{rank:05d}-of-{state.workers:05d}.safetensors", tensors)
        if rank == 0 and method:
            written |= self._write(state.step, METHOD, method)
        files = {name: about for one in gather(written) for name, about in one.items()}
        if rank == 0:
            folder = _folder(state.step)
            if missing := [n for n in files if not self.storage.is_file(f"{folder}/{n}")]:
                raise CheckpointError(
                    f"{self.storage.where(folder)}: {missing[0]} is not there: "
                    "run_dir must be shared by all nodes, as s3:// is"
                )
            self.storage.write(
                f"{folder}/{COMMIT}", json.dumps({"state": asdict(state), "files": files}, indent=1).encode()
            )
            self._prune()
        gather(None)  # no rank continues before the checkpoint exists

    def _write(self, step: int, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
        with self.storage.writing(f"{_folder(step)}/{name}") as path:
            digest = tensor_files.save(tensors, path)
            return {name: {"bytes": path.stat().st_size, "sha256": digest}}

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator["Saved"]:
        """A committed checkpoint; of a remote one each machine has a copy meanwhile. All ranks call it together.

        Its files are read whole once a machine for their checksums, each by one of its ranks. Raises CheckpointError
        on all ranks where one is damaged.
        """
        where = self.storage.where(_folder(step))
        commit, objects = ranks.from_first(lambda: self._found(step))
        folder = node_copy(where, objects)
        mine, count = ranks.on_this_machine()
        damaged = [
            name
            for n, name in enumerate(sorted(commit.files))
            if n % count == mine and not _whole(folder / name, commit.files[name])
        ]
        for name in (name for names in ranks.gather(damaged) for name in names):
            raise CheckpointError(
                f"{where}/{name} is damaged (checksum): delete that folder to go on from the one before"
            )
        with contextlib.ExitStack() as stack:
            stack.callback(release, folder)
            names = [name for name in commit.files if name != METHOD]
            try:
                opened = [stack.enter_context(safe_open(folder / name, framework="pt")) for name in names]
            except SafetensorError as e:
                raise CheckpointError(f"{where}: {e}") from None
            method = tensor_files.load(folder / METHOD, f"{where}/{METHOD}") if METHOD in commit.files else {}
            yield Saved(opened, {name: t.clone() for name, t in method.items()}, where)

    def _found(self, step: int) -> tuple[Commit, dict[str, Facts] | None]:
        """What is committed, and on S3 the objects of it."""
        commit, storage = self._commit(step), Storage(self.storage.where(_folder(step)))
        objects = None if storage.is_local() else storage.objects()
        listed = set(storage.files() if objects is None else objects)
        if missing := [name for name in commit.files if name not in listed]:
            raise CheckpointError(
                f"{storage.where(missing[0])} is missing: delete that folder to go on from the checkpoint before"
            )
        return commit, None if objects is None else {name: objects[name] for name in commit.files}

    def _commit(self, step: int) -> Commit:
        where = f"{self.storage.where(_folder(step))}/{COMMIT}"
        try:
            tree = documents.from_json(self.storage.read(f"{_folder(step)}/{COMMIT}"))
            state = {**tree["state"], "data": dict(tree["state"]["data"])}
            files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in tree["files"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(
                f"{where} is damaged: delete that folder to go on from the checkpoint before"
            ) from None
        known = {field.name for field in fields(TrainerState)}
        strange = [*(state.keys() ^ known), *(tree.keys() - {"state", "files"}), *(n for n in files if not _ours(n))]
        if strange or state["step"] != step:
            why = (
                f"{', '.join(sorted(map(str, strange)))} missing or unknown"
                if strange
                else f"it is of step {state['step']}"
            )
            raise CheckpointError(
                f"{where} is not of this version or not of this place ({why}): "
                "delete that folder to go on from the one before"
            )
        return Commit(TrainerState(**state), files)

    def _listed(self) -> dict[int, set[str]]:
        """Step -> names in its folder; what does not look like a checkpoint is left out."""
        names = defaultdict(set)
        for match in filter(None, map(_STEP.fullmatch, self.storage.files("checkpoints"))):
            if match[1] == _folder(int(match[2])).rpartition("/")[2]:
                names[int(match[2])].add(match[3])
        return names

    def _prune(self) -> None:
        """Delete all but the newest, COMMIT first, and older ones never committed; nothing that is not ours."""
        newest = self.steps()[-self.keep :]
        for step, names in self._listed().items():
            if step < newest[0]:
                self.storage.delete(f"{_folder(step)}/{COMMIT}")
                if all(map(_ours, names)):
                    self.storage.delete(_folder(step))
                else:
                    for name in filter(_ours, names):
                        self.storage.delete(f"{_folder(step)}/{name}")


class Saved:
    """Tensors of one checkpoint, as the pieces that its ranks wrote; of their files only what is asked for is read.

    method: what the method remembered.
    """

    def __init__(self, files: list, method: dict[str, torch.Tensor], where: str):
        self.method, self.where = method, where
        self._pieces: dict[tuple[str, str], list] = {}
        for file in files:
            for key in file.keys():
                kind, start, name = key.split("/", 2)
                name = tensor_name(name)
                piece = int(start), file.get_slice(key).get_shape()[0], file, key
                self._pieces.setdefault((kind, name), []).append(piece)
        for (kind, name), pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            end = 0
            for start, count, _, _ in pieces:
                if start != end:
                    raise CheckpointError(f"{where}: {kind} of {name} has a gap at element {end}")
                end += count

    def names(self) -> list[str]:
        """Names of the parameters that were trained."""
        return [name for kind, name in self._pieces if kind == "weights"]

    def count(self, kind: str, name: str) -> int:
        """Elements of a tensor; kind: weights, AVERAGE, or one of OPTIMIZER_STATE."""
        return sum(count for _, count, _, _ in self._pieces.get((kind, name), ()))

    def read(self, target: torch.Tensor, kind: str, name: str, start: int = 0) -> None:
        """Copy elements from `start` on of a saved tensor into `target` (n,).

        Raises CheckpointError where there are not so many.
        """
        stop = start + len(target)
        if self.count(kind, name) < stop:
            raise CheckpointError(f"{self.where}: {kind} of {name} ends before element {stop}")
        for at, count, file, key in self._pieces[kind, name]:
            low, high = max(start, at), min(stop, at + count)
            if low < high:
                target[low - start : high - start].copy_(file.get_slice(key)[low - at : high - at])

    def weights(self, module: torch.nn.Module, kind: str = "weights") -> None:
        """Copy the trained weights, or their AVERAGE, into a whole module on CPU. Raises CheckpointError where they do
        not fit."""
        own = dict(module.named_parameters())
        for name in self.names():
            if name not in own or own[name].numel() != self.count(kind, name):
                raise CheckpointError(
                    f"{self.where}: {name} ({self.count(kind, name)} elements) does not fit the model"
                )
            self.read(own[name].data.view(-1), kind, name)

    def restore(self, fragments: list[Fragment], step: int) -> None:
        """Copy master weights and optimizer state into a rank's fragments."""
        for f in fragments:
            self.read(f.master(), "weights", f.name, f.start)
            for kind in OPTIMIZER_STATE:
                self.read(f.state(kind), kind, f.name, f.start)
            f.set_step(step)

    def restore_average(self, fragments: Sequence[Fragment]) -> None:
        """Copy the moving average into a rank's pieces of it."""
        for f in fragments:
            self.read(f.master(), AVERAGE, f.name, f.start)


def _ours(name: str) -> bool:
    return name in (COMMIT, METHOD) or _FRAGMENTS.fullmatch(name) is not None


def _folder(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def _whole(path: Path, about: tuple[int, str]) -> bool:
    """Whether a file has this size and sha256."""
    if not path.is_file() or path.stat().st_size != about[0]:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == about[1]
