"""The SWEEP.yaml as one value, typed and validated whole, and the points of its search space.

sweep_dir: runs/alpha
run: jobs/configs/demo_fashion.yaml          # or the configuration itself
set: {training.steps: 100}                   # keys of it that are other here
search:
  method.alpha: {loguniform: [0.01, 1]}
  data.forget.per_class: {choice: [50, 100, 200]}
  data.retain.per_class: {same_as: data.forget.per_class, times: 2}
  method.noise_region: {choice: [hole, image], when: {method.name: encoder_l2}}
seeds: [0, 1, 2]
objectives: {retain.cosine.drop: minimise, forget.cosine.to_oracle: minimise}
constraints: [retain.cosine.drop <= 0.01]
search_by: tpe
budget: {points: 16}
"""

import copy
import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from unlearn import config, documents
from unlearn.config import Location, Part, Positive, RunConfig
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.registry import METHODS
from unlearn.search.objectives import Constraint, Direction, Objective, check_name

Parameters = dict[str, Any]

# Keys of a run that a sweep sets itself, and how.
SET_APART = {
    "seed": "name the seeds in `seeds`",
    "model.weights": "name the originals in `models`",
    "run_dir": "each trial has a run folder in sweep_dir",
    "name": "each trial has a name of its own",
    "cluster": "every trial takes what the run's `cluster` says",
    "evaluation": "every trial is measured as the run's `evaluation` and `tune_on` say",
    "training.engine": "every trial runs on the engine that the run names",
}
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


class OptunaTrial(Protocol):
    """What of a trial of Optuna is used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Domain(Part):
    """The values of one key: exactly one of the first six. when: values of other keys with which this one is set at all."""

    loguniform: tuple[float, float] | None = Field(default=None, description="numbers, even in their logarithm")
    uniform: tuple[float, float] | None = Field(default=None, description="numbers")
    randint: tuple[int, int] | None = Field(default=None, description="whole numbers, both ends among them")
    choice: list[Any] | None = Field(default=None, min_length=1, description="any of these values")
    grid: list[Any] | None = Field(default=None, min_length=1, description="the same, for search_by: grid")
    same_as: str | None = Field(default=None, description="another searched key whose value it takes")
    times: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="with same_as: multiplied by this")
    when: dict[str, Any] = Field(default_factory=dict, description="key: value, or a list of values")

    @model_validator(mode="after")
    def _one_kind(self):
        kinds = ("loguniform", "uniform", "randint", "choice", "grid", "same_as")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}")
        low, high = self.ends if self.ends else (0, 1)
        if not (math.isfinite(low) and math.isfinite(high) and low < high) or (self.loguniform and low <= 0):
            raise ValueError(
                f"{given[0]} [{low:g}, {high:g}]: give low < high" + (", both above 0" if self.loguniform else "")
            )
        if self.times is not None and self.same_as is None:
            raise ValueError("times is for same_as")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """(low, high) of a range, else None."""
        return self.loguniform or self.uniform or self.randint

    @property
    def values(self) -> list[Any] | None:
        """The values of a choice, else None."""
        return self.choice if self.choice is not None else self.grid

    def draw(self, rng: random.Random) -> Any:
        if self.values is not None:
            return copy.deepcopy(rng.choice(self.values))
        assert self.ends, "a tied key is not drawn"
        low, high = self.ends
        if self.randint:
            return rng.randint(int(low), int(high))
        return math.exp(rng.uniform(math.log(low), math.log(high))) if self.loguniform else rng.uniform(low, high)

    def told(self, value: Any) -> Any:
        """The value as Optuna knows it: of a choice that is not of plain values alone, its JSON."""
        plain = self.values is None or all(isinstance(each, str | int | float | bool | None) for each in self.values)
        return value if plain else json.dumps(value)

    def suggest(self, key: str, trial: OptunaTrial) -> Any:
        """A value that Optuna proposes."""
        if self.values is not None:
            names = [self.told(value) for value in self.values]
            return copy.deepcopy(self.values[names.index(trial.suggest_categorical(key, names))])
        assert self.ends, "a tied key is not proposed"
        if self.randint:
            return trial.suggest_int(key, *self.randint)
        return trial.suggest_float(key, *self.ends, log=self.loguniform is not None)


def _seconds(given: Any) -> Any:
    """Seconds of text like 90min."""
    if not isinstance(given, str):
        return given
    for unit, factor in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        if given.strip().endswith(unit):
            try:
                return float(given.strip().removesuffix(unit)) * factor
            except ValueError:
                break
    raise ValueError("write a time as seconds, or like 90min, 2h, 1d")


Seconds = Annotated[float, BeforeValidator(_seconds, json_schema_input_type=float | str), Field(gt=0)]


class Budget(Part):
    """When a sweep ends; the first bound that is met. No point is started behind it; those that run are finished."""

    points: Positive | None = Field(default=None, description="points in all, infeasible and failed ones among them")
    seconds: Seconds | None = Field(default=None, description="by the clock, over all starts: seconds, or text like 2h")
    flops: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="of the training of all trials")


class TuneOn(Part):
    """The images that objectives are measured on."""

    data: Location | None = Field(
        default=None, description="shards; none = those of data.train. Never the held-out ones"
    )
    split: str | None = Field(default=None, description="the split of them, where the folder holds several")
    limit: Positive | None = Field(default=500, description="images of each set, drawn with the seed")


def _unique(values: list) -> list:
    if len(set(values)) != len(values):
        raise ValueError("a value is there twice")
    return values


class Sweep(Part):
    """A search over the configurations of one run."""

    name: str = Field(default="sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    sweep_dir: Location = Field(description="everything the sweep writes: a path or s3://bucket/prefix")
    run: dict[str, Any] = Field(description="a run's configuration, or the path of one")
    search: dict[str, Domain] = Field(min_length=1, description="key of the run -> its values")
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_unique)] | None = Field(
        default=None, min_length=1, description="each point is run with every one; none = the run's"
    )
    models: Annotated[list[Location], AfterValidator(_unique)] | None = Field(
        default=None,
        min_length=1,
        description="originals trained alike, each point is run on every one; none = the run's",
    )
    objectives: dict[str, Direction] = Field(min_length=1, description="figure -> minimise or maximise")
    constraints: list[str] = Field(default_factory=list, description="FIGURE <= NUMBER or FIGURE >= NUMBER")
    search_by: Literal["grid", "random", "tpe", "nsga2"] = "random"
    search_seed: int = Field(default=0, ge=0, description="of the points that are drawn")
    storage: str | None = Field(default=None, description="URL of Optuna's storage; none = SQLite in sweep_dir")
    stop_early: Literal["none", "asha", "median"] = Field(
        default="none", description="give up what the first objective says is worse than the others so far"
    )
    measure_every: Positive | None = Field(
        default=None, description="with stop_early: steps between two measurements; none = a quarter of the run's steps"
    )
    budget: Budget = Field(default_factory=Budget)
    concurrent: Positive = Field(default=1, description="trials at one time; each takes what the run's `cluster` says")
    tune_on: TuneOn = Field(default_factory=TuneOn)

    @model_validator(mode="after")
    def _whole(self):
        if wrong := list(self._contradictions()):
            raise ValueError("\n".join(wrong))
        return self

    def _contradictions(self) -> Iterator[str]:
        ranges = [key for key, domain in self.search.items() if domain.ends]
        if self.search_by == "grid" and ranges:
            yield f"search_by grid: {', '.join(ranges)} is a range; give grid or choice, or search by random, tpe or nsga2"
        if self.search_by != "grid" and self.budget == Budget():
            yield f"budget: search_by {self.search_by} has no end of its own; give points, seconds or flops"
        if self.storage and self.search_by in ("grid", "random"):
            yield f"storage is for tpe and nsga2; search_by {self.search_by} needs none"
        if self.measure_every and self.stop_early == "none":
            yield "measure_every is for stop_early asha or median"
        for key, domain in self.search.items():
            if domain.same_as is not None:
                if domain.same_as not in self.search:
                    yield f"search.{key}: same_as names {domain.same_as}, which is not searched"
                elif self.search[domain.same_as].same_as is not None:
                    yield f"search.{key}: same_as names {domain.same_as}, which is tied itself; name what that is tied to"
            if key in domain.when:
                yield f"search.{key}: when names the key itself"
        try:
            _ordered(self.search)
        except ValueError as e:
            yield str(e)

    @cached_property
    def settings(self) -> RunConfig:
        """The run with the first value of every key that is set without a condition. Raises ConfigError."""
        free = {key: domain for key, domain in self.search.items() if not domain.when}
        first = {
            key: (domain.values or domain.ends or (None,))[0] for key, domain in free.items() if not domain.same_as
        }
        tied = {
            key: _times(first[domain.same_as], domain.times) for key, domain in free.items() if domain.same_as in first
        }
        return self.of(first | tied, *self.pairs()[0], "run")

    def _seeds(self) -> list[int]:
        return self.seeds or [int(self.run.get("seed", 0))]

    def _models(self) -> list[str | None]:
        return list(self.models or [None])

    # What a job that is sent elsewhere is asked for, as of a RunConfig.

    @property
    def run_dir(self) -> str:
        return self.sweep_dir

    @property
    def cluster(self) -> config.Cluster:
        """What all trials at one time take."""
        one = self.settings.cluster
        least = one.min_workers and one.min_workers * self.concurrent
        return one.model_copy(update={"workers": one.workers * self.concurrent, "min_workers": least})

    @property
    def names_rows(self) -> bool:
        """Whether it names single images or persons: see RunConfig."""
        searched = (key.rpartition(".")[2] for key in self.search)
        return self.settings.names_rows or any(key in ("ids", "subjects") for key in searched)

    def locations(self) -> dict[str, str]:
        """Every place that the sweep reads or writes, by its key."""
        places = {f"run.{key}": uri for key, uri in self.settings.locations().items() if key != "run_dir"}
        places |= {f"models.{number}": uri for number, uri in enumerate(self.models or ())}
        return (
            places | {"sweep_dir": self.sweep_dir} | ({"tune_on.data": self.tune_on.data} if self.tune_on.data else {})
        )

    def elsewhere(self) -> "Sweep":
        """The same for a job that finds its Ray cluster where it runs."""
        run = copy.deepcopy(self.run)
        _put(run, "cluster.address", None)
        return self.model_copy(update={"run": run})

    def stages(self, steps: int) -> list[int]:
        """The steps behind which a trial of so many is measured, its last one among them."""
        if self.stop_early == "none":
            return [steps]
        every = self.measure_every or -(-steps // 4)
        return [*range(every, steps, every), steps]

    def pairs(self) -> list[tuple[int, str | None]]:
        """(seed, model) of each trial of a point; model None: the run's own."""
        return list(itertools.product(self._seeds(), self._models()))

    def trial_id(self, point: str, seed: int, model: str | None) -> str:
        return f"{point}-s{seed}-m{self._models().index(model)}"

    def of(self, parameters: Parameters, seed: int, model: str | None, id: str) -> RunConfig:
        """The run of one trial. Raises ConfigError where it is not valid.

        It is measured on `tune_on`: by default images of the training shards, of the classes of its sets and drawn with its seed,
        the same for every point of equal classes, however few of them it has seen. They are not taken out of the training: a trial
        is the very run that its configuration says.
        """
        tree = config.override(copy.deepcopy(self.run), [])
        for key, value in parameters.items():
            _put(tree, key, copy.deepcopy(value))
        _put(tree, "seed", seed)
        if model is not None:
            _put(tree, "model.weights", model)
        _put(tree, "name", f"{self.name}-{id}"[:100])
        _put(tree, "run_dir", Storage(self.sweep_dir).where(f"runs/{id}"))
        data: dict = tree["data"] if isinstance(tree.get("data"), dict) else {}
        _put(tree, "evaluation.data", self.tune_on.data or data.get("train"))
        _put(tree, "evaluation.split", self.tune_on.split or (None if self.tune_on.data else data.get("split")))
        _put(tree, "evaluation.limit", self.tune_on.limit)
        return config.parse(tree, id)

    @property
    def wanted(self) -> list[Objective]:
        return [Objective(figure, direction) for figure, direction in self.objectives.items()]

    @cached_property
    def bounds(self) -> list[Constraint]:
        """Raises ConfigError."""
        return [Constraint.parse(text) for text in self.constraints]

    def assembled(self, pick: Callable[[str, Domain], Any]) -> Parameters:
        """A point, whose values `pick` chooses: conditional keys where their condition holds, then the tied ones."""
        chosen: Parameters = {}
        for key in _ordered(self.search):
            domain = self.search[key]
            if domain.same_as is None and self._applies(domain, chosen):
                chosen[key] = pick(key, domain)
        for key, domain in self.search.items():
            if domain.same_as in chosen and self._applies(domain, chosen):
                chosen[key] = _times(chosen[domain.same_as], domain.times)
        return {key: chosen[key] for key in self.search if key in chosen}

    def _applies(self, domain: Domain, chosen: Parameters) -> bool:
        for key, wanted in domain.when.items():
            value = chosen[key] if key in chosen else None if key in self.search else _get(self.settings, key)
            if value not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
        return True

    def grid(self) -> list[Parameters]:
        """Every combination of the values, each once, the last key changing fastest."""
        free = {key: domain.values or [] for key, domain in self.search.items() if domain.same_as is None}
        made: dict[str, Parameters] = {}
        for values in itertools.product(*free.values()):
            picked = dict(zip(free, values, strict=True))
            point = self.assembled(lambda key, domain, picked=picked: copy.deepcopy(picked[key]))
            made.setdefault(canonical(point), point)
        return list(made.values())

    @property
    def size(self) -> int | None:
        """How many points there are; None for a space of ranges."""
        return None if any(domain.ends for domain in self.search.values()) else len(self.grid())

    def drawn(self) -> Iterator[Parameters]:
        """Points drawn with search_seed, without end; equal ones may come again."""
        rng = random.Random(self.search_seed)
        while True:
            yield self.assembled(lambda key, domain: domain.draw(rng))

    def identity(self) -> str:
        """sha256 of all that makes it this sweep: it may go on with another budget, or more trials at one time."""
        tree = self.model_dump(mode="json", exclude={"budget", "concurrent"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def canonical(parameters: Parameters) -> str:
    """Text that is equal for equal points."""
    return json.dumps(parameters, sort_keys=True)


def load(source: str, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep that `source` names: a YAML file (path or s3://), the folder of a sweep, or env:VARIABLE. overrides: "key=value" of
    the sweep, and "run.key=value" of its run. Raises ConfigError, StorageError."""
    if source.startswith("env:"):
        variable = source.removeprefix("env:")
        if variable not in os.environ:
            raise ConfigError(f"{source}: this variable is not set; a sweep is expected in it")
        return read(os.environ[variable], source, overrides)
    if Path(source).suffix not in (".yaml", ".yml"):
        if not Storage(source).is_file("sweep.yaml"):
            raise ConfigError(f"{source}: neither a YAML file nor the folder of a sweep (no sweep.yaml in it)")
        source = Storage(source).where("sweep.yaml")
    return read(Storage(source).read().decode(errors="replace"), source, overrides)


def read(text: str, source: str, overrides: Sequence[str] = ()) -> Sweep:
    """The same from the text of a file; `source` names it in messages."""
    try:
        tree = documents.from_yaml(text) or {}
    except ValueError as e:
        raise ConfigError(f"sweep {source} is not YAML: {e}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"sweep {source}: expected keys and values at the top, found {type(tree).__name__}")
    of_run = [item.removeprefix("run.") for item in overrides if item.startswith("run.")]
    tree = config.override(tree, [item for item in overrides if not item.startswith("run.")])
    tree["set"] = (tree.get("set") or {}) | {
        item.partition("=")[0]: config.override({}, [f"value={item.partition('=')[2]}"])["value"] for item in of_run
    }
    return parse(tree, source)


def parse(tree: dict, source: str = "sweep") -> Sweep:
    """Validate a tree of plain values, and every key and value that is searched. Raises ConfigError."""
    tree = copy.deepcopy(tree)
    changes = tree.pop("set", None) or {}
    run = tree.get("run")
    if isinstance(run, str):
        run = _run_file(run, source)
    if not isinstance(run, dict):
        raise ConfigError(f"{source}: run: give a run's configuration, or the path of one")
    if not isinstance(changes, dict):
        raise ConfigError(f"{source}: set: give keys of the run with their values, as in method.alpha: 0.5")
    for key, value in changes.items():
        _put(run, key, value)
    tree["run"] = run
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as e:
        lines = [line for error in e.errors() for line in config.explain(error, Sweep)]
        raise ConfigError(
            f"{source}: " + ("; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines))
        ) from None
    _check(sweep, source)
    return sweep


def dump(sweep: Sweep) -> str:
    """The sweep as YAML, its run inline."""
    return yaml.safe_dump(sweep.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def _run_file(given: str, source: str) -> dict:
    """The tree of a run's file, which is found from here or from beside the sweep's file."""
    beside = Path(source).parent / given if "://" not in source and not source.startswith("env:") else Path(given)
    path = given if "://" in given or Path(given).exists() or not beside.exists() else str(beside)
    if not Storage(path).is_file():
        raise ConfigError(f"{source}: run: there is no file {given}")
    try:
        tree = documents.from_yaml(Storage(path).read().decode(errors="replace"))
    except ValueError as e:
        raise ConfigError(f"{source}: run: {given} is not YAML: {e}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: run: {given} holds no configuration")
    return tree


def _check(sweep: Sweep, source: str) -> None:
    """Raises ConfigError where the run is not valid, and for keys, values, figures and bounds that cannot be."""
    held_out, tune_on = sweep.run.get("evaluation") or {}, sweep.tune_on
    if (tune_on.data or tune_on.split) and held_out.get("split") == tune_on.split:
        if (config.location(held_out["data"]) if held_out.get("data") else None) == tune_on.data:
            raise ConfigError(
                f"{source}: tune_on names the images of run.evaluation: those are held out, to tell of the result"
            )
    settings = sweep.settings
    if not METHODS.load(settings.method.name).needs_forget:
        raise ConfigError(
            f"{source}: run.method {settings.method.name} forgets nothing: there is no trade-off to search"
        )
    for key, domain in sweep.search.items():
        where = f"{source}: search.{key}"
        for apart, why in SET_APART.items():
            if key == apart or key.startswith(f"{apart}."):
                raise ConfigError(f"{where}: not to be searched: {why}")
        _check_key(sweep, key, where)
        for other in domain.when:
            if other not in sweep.search:
                _check_key(sweep, other, f"{where}.when")
        _check_values(sweep, key, domain, where)
    for objective in sweep.wanted:
        check_name(objective.figure, settings, f"{source}: objectives")
    try:
        bounds = sweep.bounds
    except ConfigError as e:
        raise ConfigError(f"{source}: constraints: {e}") from None
    for bound in bounds:
        check_name(bound.figure, settings, f"{source}: constraints")


def _check_key(sweep: Sweep, key: str, where: str) -> None:
    """Raise ConfigError for a key that the run cannot have, with any of the methods that the sweep may give it."""
    domain = sweep.search.get("method.name")
    names = domain.values if domain and domain.values else [sweep.settings.method.name]
    faults = [fault for name in names if (fault := config.unknown_key(key, str(name)))]
    if len(faults) == len(names):
        raise ConfigError(f"{where}: {faults[0]}")


def _check_values(sweep: Sweep, key: str, domain: Domain, where: str) -> None:
    """Raise ConfigError where the run refuses a value of the key for the key's own sake."""
    conditions = {other: (wanted[0] if isinstance(wanted, list) else wanted) for other, wanted in domain.when.items()}
    if (
        key.startswith("method.")
        and key != "method.name"
        and "method.name" in sweep.search
        and "method.name" not in conditions
    ):
        conditions["method.name"] = next(
            n for n in sweep.search["method.name"].values or [] if not config.unknown_key(key, str(n))
        )
    if key.startswith("training.") and key.rpartition(".")[2] in ("steps", "epochs"):
        conditions["training.epochs" if key.endswith("steps") else "training.steps"] = None
    for value in domain.values or domain.ends or ():
        try:
            sweep.of(conditions | {key: value}, *sweep.pairs()[0], "run")
        except ConfigError as e:
            lines = (line.strip().removeprefix("run: ") for line in str(e).splitlines())
            if fault := next((line for line in lines if line.startswith(key)), None):
                raise ConfigError(f"{where}: {fault.removeprefix(key).lstrip(': ')}") from None


def _ordered(search: dict[str, Domain]) -> list[str]:
    """The keys, each behind those that its condition names. Raises ValueError for a circle."""
    order, left = [], list(search)
    while left:
        ready = [key for key in left if not any(other in left for other in search[key].when if other != key)]
        if not ready:
            raise ValueError(f"search: the conditions of {', '.join(left)} name each other in a circle")
        order += ready
        left = [key for key in left if key not in ready]
    return order


def _times(value: Any, factor: float | None) -> Any:
    if factor is None:
        return copy.deepcopy(value)
    product = value * factor
    return int(product) if isinstance(value, int) and float(product).is_integer() else product


def _put(tree: dict, key: str, value: Any) -> None:
    """Set `a.b` of a tree, parts made where they are missing."""
    *path, last = key.split(".")
    for name in path:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def _get(settings: RunConfig, key: str) -> Any:
    """The value of `a.b`; None where a part is not there."""
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value
