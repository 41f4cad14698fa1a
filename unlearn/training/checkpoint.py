"""Checkpoints: each rank's fragments as safetensors, and a COMMIT file written last.

    checkpoints/step-00000100/rank-00000-of-00002.safetensors    tensors "KIND/START/NAME", flat, float32
                              COMMIT                             JSON: trainer state, size and sha256 of every file

A folder without COMMIT does not exist. The files know no world size: any number of ranks reads what any number wrote.
"""

import contextlib
import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unlearn.aliases import first_hash
from unlearn.data.storage import Storage, local_copy
from unlearn.errors import CheckpointError
from unlearn.run import Run
from unlearn.training.fragments import OPTIMIZER_STATE, Fragment

COMMIT = "COMMIT"


@dataclass(frozen=True)
class TrainerState:
    """All of the trainer's state beside weights and optimizer: order, views and noise are functions of the step."""

    step: int
    samples: int
    config: str  # RunConfig.hash()
    data: dict[str, str]  # set -> manifest hash, and "weights" -> sha256 of what training started from
    workers: int

    def check(self, run: Run, where: str) -> None:
        """Raise CheckpointError where the run to be continued is another one."""
        now = run.settings.hash()
        if self.config not in (now, first_hash(run.settings)):
            raise CheckpointError(
                f"{where} was written with another config (hash {self.config[:12]}, now {now[:12]}): "
                "resume with the config of the run, or start a new run_dir"
            )
        data = {"first_stage" if name == "front" else name: value for name, value in self.data.items()}
        if data != run.origin:
            changed = ", ".join(name for name in data | run.origin if data.get(name) != run.origin.get(name))
            raise CheckpointError(f"{where}: the data has changed since ({changed}); start a new run_dir")


class Checkpoints:
    """The checkpoints of one run. keep: how many of the newest stay."""

    def __init__(self, run_dir: str, keep: int):
        self.storage, self.keep = Storage(run_dir), keep

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        names = [n for n in self.storage.files("checkpoints") if n.endswith(f"/{COMMIT}")]
        return sorted(int(n.split("/")[1].removeprefix("step-")) for n in names)

    def state(self, step: int) -> TrainerState:
        return TrainerState(**self._commit(step)["state"])

    def save(self, fragments: list[Fragment], state: TrainerState, rank: int, gather: Callable[[object], list]) -> None:
        """Write this rank's fragments; rank 0 commits when all have. `gather` collects one object from every rank."""
        fragments = [f for f in fragments if rank == 0 or not f.replicated]
        tensors = {f"weights/{f.start}/{f.name}": f.master().cpu() for f in fragments}
        for kind in OPTIMIZER_STATE:
            tensors |= {f"{kind}/{f.start}/{f.name}": f.state(kind).cpu() for f in fragments}
        folder, name = _folder(state.step), f"rank-{rank:05d}-of-{state.workers:05d}.safetensors"
        with tempfile.TemporaryDirectory(**self._near(folder)) as temporary:
            path = Path(temporary) / name
            save_file({k: t.contiguous() for k, t in tensors.items()}, path)
            about = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            self.storage.upload(path, f"{folder}/{name}")
        files = dict(gather((name, about)))
        if rank == 0:
            if missing := [n for n in files if not self.storage.is_file(f"{folder}/{n}")]:
                raise CheckpointError(f"{self.storage.where(folder)}: {missing[0]} is not there: run_dir must be shared by all nodes, as s3:// is")
            self.storage.write(f"{folder}/{COMMIT}", json.dumps({"state": asdict(state), "files": files}, indent=1).encode())
            self._prune()
        gather(None)  # nobody runs on before the checkpoint exists

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator["Saved"]:
        """A committed checkpoint, its files checked and at hand. Raises CheckpointError where one is damaged."""
        folder, files = _folder(step), self._commit(step)["files"]
        with contextlib.ExitStack() as stack:
            opened = []
            for name, about in files.items():
                path = stack.enter_context(local_copy(self.storage.where(f"{folder}/{name}")))
                if path.stat().st_size != about["bytes"] or _sha256(path) != about["sha256"]:
                    raise CheckpointError(
                        f"{self.storage.where(folder)}/{name} is damaged (checksum): delete that folder to go on from the one before"
                    )
                try:
                    opened.append(stack.enter_context(safe_open(path, framework="pt")))
                except SafetensorError as e:
                    raise CheckpointError(f"{self.storage.where(folder)}/{name}: {e}") from None
            yield Saved(opened, self.storage.where(folder))

    def _commit(self, step: int) -> dict:
        try:
            return json.loads(self.storage.read(f"{_folder(step)}/{COMMIT}"))
        except ValueError:
            raise CheckpointError(f"{self.storage.where(_folder(step))}/{COMMIT} is damaged: delete that folder") from None

    def _prune(self) -> None:
        """Delete all but the newest, COMMIT first, and older ones that were never committed."""
        kept = self.steps()[-self.keep :]
        found = {int(n.split("/")[1].removeprefix("step-")) for n in self.storage.files("checkpoints")}
        for step in sorted(found - set(kept)):
            if step < kept[0]:
                self.storage.delete(f"{_folder(step)}/{COMMIT}")
                self.storage.delete(_folder(step))

    def _near(self, folder: str) -> dict:
        """Where to write first: on the run's own disk, so that publishing is a rename, and where pruning finds what is left."""
        if not self.storage.is_local():
            return {}
        place = Path(self.storage.where(folder))
        place.mkdir(parents=True, exist_ok=True)
        return {"dir": place, "prefix": ".part-"}


class Saved:
    """Tensors of one checkpoint, put together from the pieces of all ranks."""

    def __init__(self, files: list, where: str):
        self.where = where
        self._pieces: dict[tuple[str, str], list] = defaultdict(list)
        for file in files:
            for key in file.keys():
                kind, start, name = key.split("/", 2)
                self._pieces[kind, name].append((int(start), file, key))

    def names(self) -> list[str]:
        """Names of the parameters that were trained."""
        return [name for kind, name in self._pieces if kind == "weights"]

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """The whole flattened tensor; kind: weights, or one of OPTIMIZER_STATE."""
        pieces = sorted(self._pieces[kind, name], key=lambda piece: piece[0])
        expected, parts = 0, []
        for start, file, key in pieces:
            if start != expected:
                raise CheckpointError(f"{self.where}: {kind} of {name} has a gap at element {expected}")
            parts.append(file.get_tensor(key))
            expected += parts[-1].numel()
        return torch.cat(parts)

    def weights(self, module: torch.nn.Module) -> None:
        """Copy the trained weights into a whole module on CPU. Raises CheckpointError where they do not fit."""
        own = dict(module.named_parameters())
        for name in self.names():
            tensor = self.tensor("weights", name)
            if name not in own or own[name].numel() != tensor.numel():
                raise CheckpointError(f"{self.where}: {name} ({tensor.numel()} elements) does not fit the model")
            own[name].data.copy_(tensor.view(own[name].shape))

    def restore(self, fragments: list[Fragment], step: int) -> None:
        """Copy master weights and optimizer state into a rank's fragments."""
        for f in fragments:
            f.master().copy_(self.tensor("weights", f.name)[f.start : f.start + f.count])
            for kind in OPTIMIZER_STATE:
                f.state(kind).copy_(self.tensor(kind, f.name)[f.start : f.start + f.count])
            f.set_step(step)


def _folder(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
