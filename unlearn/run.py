"""A run as one value: its configuration, the rows of its sets, what it starts from, and how long it is.

The driver resolves it once and hands it to workers and actors, so no station asks the storage again for the same facts.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from unlearn import config
from unlearn.config import RunConfig
from unlearn.data import held_out, order, selection
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.methods import base as methods
from unlearn.models import weights
from unlearn.models.weights import Source, Sources

_SENT = re.compile(r"/configs/([0-9a-f]{16})\.yaml$")  # what a submitted job was sent, in its run folder


@dataclass(frozen=True)
class Run:
    """settings: the configuration. sets: the rows that training sees, "retain" and, where the method forgets, "forget".
    measured: the rows that the evaluation sees, where there will be one.
    origin: sha256 of the manifest of each set, of its file of ids, and of the weights it starts from.
    steps: optimizer steps of the whole run.
    sources: what the storage says of the weights that the run reads, by their URI.
    without: the digest of data.forget where the method does not forget, and training leaves it out.
    """

    settings: RunConfig
    sets: dict[str, RowSet]
    measured: dict[str, RowSet]
    origin: dict[str, str]
    steps: int
    sources: dict[str, Source] = field(default_factory=dict)
    without: str = ""

    @property
    def folder(self) -> str:
        return self.settings.run_dir

    @property
    def trained_on(self) -> str:
        """Hash of the manifest of data.train."""
        return self.sets.get("forget", self.sets["retain"]).manifest.hash

    def with_workers(self, workers: int) -> "Run":
        """The same run on another number of workers, where nodes were lost and cluster.min_workers allows it."""
        cluster = self.settings.cluster.model_copy(update={"workers": workers})
        return replace(self, settings=self.settings.model_copy(update={"cluster": cluster}))

    def with_weights(self, uris: Iterable[str | None]) -> "Run":
        """The same run that knows these weights too. Raises StorageError and WeightsError."""
        return replace(self, sources=self.sources | weights.located(uris, self.sources))


def resolve(settings: RunConfig, measured: bool | None = None, known: Sources | None = None) -> Run:
    """Look up everything that a run takes from its storage. Raises UnlearnError: no such data, class or weights; an
    overlap.

    measured: whether the rows of an evaluation are looked up too; by default where the method forgets, so that there is
    an original to compare with. known: weights that have been looked up already.
    """
    method = methods.method_class(settings.method.name)
    chosen = selection.sets(settings.data, settings.seed)
    wanted = method.needs_forget if measured is None else measured
    rows = held_out.sets(settings, chosen) if wanted else {}
    listed = {f"{name}.ids_from": rows.ids_file for name, rows in chosen.items() if rows.ids_file}
    without = chosen.pop("forget").digest if "forget" in chosen and not method.needs_forget else ""
    files = {"weights": settings.model.weights, "first_stage": settings.model.first_stage}
    sources = weights.located(files.values(), known)
    origin = {name: rows.manifest.hash for name, rows in chosen.items()}
    origin |= listed | {name: sources[uri].fingerprint for name, uri in files.items() if uri}
    return Run(settings, chosen, rows, origin, steps(settings, chosen), sources, without)


def steps(settings: RunConfig, chosen: dict[str, RowSet]) -> int:
    """Optimizer steps of a run; an epoch is a pass over the set that takes longest."""
    training = settings.training
    if training.steps:
        return training.steps
    assert training.epochs is not None, "a configuration gives one of the two"
    retain, forget = order.split(settings.micro_batch, training.forget_fraction if "forget" in chosen else 0)
    per_step = training.batch_size // settings.micro_batch
    passes = [len(chosen["retain"]) / (retain * per_step)]
    passes += [len(chosen["forget"]) / (forget * per_step)] if forget else []
    return max(1, math.ceil(training.epochs * max(passes)))


def load(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that `source` names: a YAML file (path or s3://), the folder of a run, or env:VARIABLE.

    overrides: "a.b=value". Raises ConfigError, StorageError.
    """
    if source.startswith("env:"):
        if (variable := source.removeprefix("env:")) not in os.environ:
            raise ConfigError(f"{source}: this variable is not set; a configuration is expected in it")
        return config.read(os.environ[variable], source, overrides)
    if Path(source).suffix in (".yaml", ".yml"):
        if (sent := _SENT.search(source)) and hashlib.sha256(Storage(source).read()).hexdigest()[:16] != sent[1]:
            raise ConfigError(
                f"{source} was changed after it was sent: its name is the hash of its content; submit again"
            )
        if "://" not in source:
            return config.load(source, overrides)
        return config.read(Storage(source).read().decode(errors="replace"), source, overrides)
    storage = Storage(source)
    if not storage.is_file("config.yaml"):
        raise ConfigError(f"{source}: neither a YAML file nor the folder of a run (no config.yaml in it)")
    # The folder that was named is meant, also where it is a copy of the one that its config names.
    here = f"run_dir={yaml.safe_dump(source, default_style=chr(34)).strip()}"
    return config.read(storage.read("config.yaml").decode(), f"{source}/config.yaml", [here, *overrides])
