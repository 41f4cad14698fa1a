"""COMPARE.yaml: methods side by side, each with the same budget, the same seeds and originals, and the same tuning.

compare_dir: runs/compare
run: demo_fashion.yaml          # or the configuration itself; its evaluation names held-out images and oracles
set: {training.steps: 100}      # keys of it that are other here
methods:
  paper: {method: {name: encoder_l2}, tune: {method.alpha: [0.1, 1.0]}}
  retain label: {method: {name: retain_label}, tune: {method.alpha: [0.25, 1.0]}}
tune: {common: {training.lr: [1.0e-4, 1.0e-3]}}
seeds: [0, 1, 2]
audit: {tests: [transfer, relearning], limit: 200}   # of every run, as an AUDIT.yaml; none = not at all
originals:
- {weights: runs/base/model, oracles: [runs/base-oracle/seed-0/model, runs/base-oracle/seed-1/model]}
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, field_validator, model_validator

from unlearn import config, run_files
from unlearn.config import Location, Part, Positive, RunConfig
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.registry import METHODS
from unlearn.run_files import put
from unlearn.search.domain import Domain
from unlearn.search.objectives import Direction, check_name
from unlearn.search.space import Parameters, Sweep, canonical

FILE = "compare.yaml"  # in the comparison's folder
Values = Annotated[list[Any], Field(min_length=1)]


class Entry(Part):
    """One method of a comparison."""

    method: dict[str, Any] = Field(description="`method` of the run: its name and options")
    set: dict[str, Any] = Field(default_factory=dict, description="other keys of the run that it needs")
    tune: dict[str, Values] = Field(
        default_factory=dict, description="key of the run -> values to choose from, besides tune.common"
    )


class Original(Part):
    """A model that forgets, and the models trained alike without the forget set."""

    weights: Location
    oracles: list[Location] = Field(default_factory=list)


class Tune(Part):
    """How the values of every method are chosen: on training images, with the first seed and original."""

    common: dict[str, Values] = Field(default_factory=dict, description="key of the run -> values, for every method")
    limit: Positive | None = Field(default=500, description="training images of each set that are measured")
    choose: list[str] = Field(
        default_factory=lambda: ["forget.cosine.to_oracle", "retain.cosine.to_oracle"],
        min_length=1,
        description="figures whose sum is to be smallest, as a sweep names them",
    )


class Compare(Part):
    """Methods x seeds x originals."""

    name: str = Field(default="compare", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    compare_dir: Location = Field(description="everything that is written: a path or s3://bucket/prefix")
    run: dict[str, Any] = Field(description="a run's configuration, or the path of one")
    methods: dict[str, Entry] = Field(min_length=1, description="label -> method")
    tune: Tune = Field(default_factory=Tune)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    originals: list[Original] | None = Field(
        default=None, min_length=1, description="none = the run's own weights and oracles"
    )
    concurrent: Positive = Field(default=1, description="trials at one time; each takes what the run's `cluster` says")
    audit: dict[str, Any] | None = Field(
        default=None,
        description="what every run that is compared is audited with, as in an AUDIT.yaml; none = not at all",
    )

    @model_validator(mode="after")
    def _fair(self):
        counts = {label: len(self.candidates(label)) for label in self.methods}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{label} {count}" for label, count in counts.items())
            raise ValueError(f"methods: each is tuned over as many settings as the others, or none is; now {told}")
        return self

    def candidates(self, label: str) -> list[Parameters]:
        """The settings that a method is chosen from: every combination of its values."""
        entry = self.methods[label]
        values, made = self.tune.common | entry.tune, []
        for picked in itertools.product(*values.values()):
            tree: dict[str, Any] = {"method": copy.deepcopy(entry.method)}
            parameters: Parameters = copy.deepcopy(entry.set)
            for key, value in zip(values, picked, strict=True):
                put(tree, key, value) if key.startswith("method.") else parameters.update({key: value})
            made.append({**parameters, **tree})
        return made

    @field_validator("seeds", "originals")
    @classmethod
    def _once(cls, values: list[Any] | None) -> list[Any] | None:
        told = [value.weights if isinstance(value, Original) else value for value in values or []]
        if twice := [value for value in told if told.count(value) > 1]:
            raise ValueError(f"{twice[0]} is there twice")
        return values

    @field_validator("originals")
    @classmethod
    def _one_unit(cls, originals: list[Original] | None) -> list[Original] | None:
        if len({min(len(original.oracles), 2) for original in originals or []}) > 1:
            raise ValueError(
                "distances to no oracle, to one, and in units of the spread of several cannot be averaged: give each "
                "original several oracles, or each one, or each none"
            )
        return originals

    @property
    def tunes(self) -> bool:
        return any(len(self.candidates(label)) > 1 for label in self.methods)

    def tuning(self) -> "Stage":
        """The runs that the settings are chosen by."""
        points = [parameters for label in self.methods for parameters in self.candidates(label)]
        return self._stage("tune", points, self.seeds[:1], (self.originals or [None])[:1], self.tune.limit)

    def final(self, chosen: dict[str, Parameters]) -> "Stage":
        """The runs that are compared. chosen: the settings of each method."""
        return self._stage("runs", list(chosen.values()), self.seeds, self.originals or [None], None)

    def _stage(
        self,
        part: str,
        points: list[Parameters],
        seeds: list[int],
        originals: Sequence[Original | None],
        limit: int | None,
    ) -> "Stage":
        known = [original for original in originals if original is not None]
        return Stage.model_validate({
            "name": f"{self.name}-{part}", "sweep_dir": Storage(self.compare_dir).where(part), "run": self.run,
            "points": points,
            "seeds": seeds, "models": [original.weights for original in known] or None, "concurrent": self.concurrent,
            "oracles": {original.weights: original.oracles for original in known}, "training_images": part == "tune",
            "tune_on": {"limit": limit},
        })  # fmt: skip

    @cached_property
    def settings(self) -> RunConfig:
        """One of its runs. Raises ConfigError."""
        return self.final({label: self.candidates(label)[0] for label in self.methods}).settings

    def identity(self) -> str:
        """sha256 of all that makes it this comparison."""
        tree = self.model_dump(mode="json", exclude={"concurrent", "audit"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


class Stage(Sweep):
    """The runs of a comparison as a sweep over points that are given. oracles: of each model. training_images: whether
    they are measured there, else on the held-out images of the run."""

    gives_up: ClassVar[bool] = False  # a method that fails with every seed is an outcome

    search: dict[str, Domain] = Field(default_factory=dict)
    points: list[dict[str, Any]]
    oracles: dict[str, list[str]] = Field(default_factory=dict)
    training_images: bool = False
    objectives: dict[str, Direction] = Field(default_factory=lambda: {"retain.cosine": "maximise"})
    search_by: Any = "grid"

    def grid(self) -> list[Parameters]:
        return list({canonical(point): point for point in self.points}.values())

    @property
    def size(self) -> int | None:
        return len(self.grid())

    @cached_property
    def settings(self) -> RunConfig:
        return self.of(self.points[0], *self.pairs()[0], "run")

    def tree(self, parameters: Parameters, seed: int, model: str | None, id: str) -> dict[str, Any]:
        made = super().tree(parameters, seed, model, id)
        if not self.training_images:
            made["evaluation"] = copy.deepcopy(self.run.get("evaluation") or {})
        if model is not None:
            put(made, "evaluation.oracle", self.oracles.get(model) or None)
        return made


def load(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Compare:
    """The comparison that `source` names: a YAML file (path or s3://), or its folder. overrides: "key=value" of it, and
    "run.key=value" of its run. Raises ConfigError, StorageError."""
    if Path(source).suffix not in (".yaml", ".yml"):
        if not Storage(source).is_file(FILE):
            raise ConfigError(f"{source}: neither a YAML file nor the folder of a comparison (no {FILE} in it)")
        source = Storage(source).where(FILE)
    tree = config.yaml_tree(run_files.text(source, "comparison"), f"comparison {source}")
    return parse(run_files.overridden(tree, overrides), source)


def parse(tree: dict, source: str = "comparison") -> Compare:
    """Validate a tree of plain values, and the run of every method with every setting. Raises ConfigError."""
    compare = config.validated(Compare, run_files.with_run(tree, source), source)
    for label in compare.methods:
        for parameters in compare.candidates(label):
            try:
                settings = compare.final({label: parameters}).settings
            except ConfigError as e:
                raise ConfigError(f"{source}: methods.{label}: {e}") from None
            if not METHODS.load(settings.method.name).needs_forget:
                raise ConfigError(f"{source}: methods.{label}: {settings.method.name} forgets nothing")
    if compare.tunes:
        for figure in compare.tune.choose:
            check_name(figure, compare.tuning().settings, f"{source}: tune.choose")
    return compare


def dump(compare: Compare) -> str:
    """The comparison as YAML, its run inline."""
    return yaml.safe_dump(compare.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
