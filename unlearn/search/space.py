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
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from unlearn import config, method_options
from unlearn.config import Location, Part, Positive, RunConfig
from unlearn.data.storage import Storage
from unlearn.run_files import put
from unlearn.search.domain import Domain, ordered, times
from unlearn.search.objectives import Constraint, Direction, Objective
from unlearn.search.sweep_checks import contradictions

Parameters = dict[str, Any]

# Keys that may change while a sweep goes on: they decide no point and no figure.
FREE = ("budget", "concurrent", "log_to", "tracking_uri")

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


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

    # whether several failures of one cause in a row end it
    gives_up: ClassVar[bool] = True

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
    search_by: Literal["grid", "random", "tpe", "nsga2", "pbt"] = "random"
    search_seed: int = Field(default=0, ge=0, description="of the points that are drawn")
    storage: str | None = Field(default=None, description="URL of Optuna's storage; none = SQLite in sweep_dir")
    stop_early: Literal["none", "asha", "median"] = Field(
        default="none", description="give up what the first objective says is worse than the others so far"
    )
    measure_every: Positive | None = Field(
        default=None,
        description="with stop_early or pbt: steps between two measurements; none = a quarter of the run's steps",
    )
    budget: Budget = Field(default_factory=Budget)
    concurrent: Positive = Field(default=1, description="trials at one time; each takes what the run's `cluster` says")
    tune_on: TuneOn = Field(default_factory=TuneOn)
    log_to: Annotated[list[Literal["tensorboard", "mlflow"]], AfterValidator(_unique)] = Field(
        default_factory=list, description="where parameters and figures of points are written too"
    )
    tracking_uri: str | None = Field(
        default=None, description="of MLflow; none = MLFLOW_TRACKING_URI, or SQLite in sweep_dir"
    )

    @model_validator(mode="after")
    def _whole(self):
        if wrong := list(contradictions(self)):
            raise ValueError("\n".join(wrong))
        return self

    @property
    def in_stages(self) -> bool:
        """Whether a trial is measured before its end too."""
        return self.stop_early != "none" or self.search_by == "pbt"

    @cached_property
    def settings(self) -> RunConfig:
        """The run with the first value of every key that is set without a condition. Raises ConfigError."""
        free = {key: domain for key, domain in self.search.items() if not domain.when}
        first = {
            key: (domain.values or domain.ends or (None,))[0] for key, domain in free.items() if not domain.same_as
        }
        tied = {
            key: times(first[domain.same_as], domain.times) for key, domain in free.items() if domain.same_as in first
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
        put(run, "cluster.address", None)
        return self.model_copy(update={"run": run})

    def stages(self, steps: int) -> list[int]:
        """The steps behind which a trial of so many is measured, its last one among them."""
        if not self.in_stages:
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

        It is measured on `tune_on`: by default images of the training shards, of the classes of its sets and drawn with
        its seed, the same for every point of equal classes, however few of them it has seen. They are not taken out of
        the training: a trial is the very run that its configuration says.
        """
        return config.parse(self.tree(parameters, seed, model, id), id)

    def tree(self, parameters: Parameters, seed: int, model: str | None, id: str) -> dict[str, Any]:
        """The same as plain values, not yet validated."""
        tree = config.override(copy.deepcopy(self.run), [])
        former = method_options.name_in(tree)
        for key, value in parameters.items():
            put(tree, key, copy.deepcopy(value))
        method_options.drop_former(tree, former, parameters)
        put(tree, "seed", seed)
        if model is not None:
            put(tree, "model.weights", model)
        put(tree, "name", f"{self.name}-{id}"[:100])
        put(tree, "run_dir", Storage(self.sweep_dir).where(f"runs/{id}"))
        data: dict = tree["data"] if isinstance(tree.get("data"), dict) else {}
        put(tree, "evaluation.data", self.tune_on.data or data.get("train"))
        put(tree, "evaluation.split", self.tune_on.split or (None if self.tune_on.data else data.get("split")))
        put(tree, "evaluation.limit", self.tune_on.limit)
        return tree

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
        for key in ordered(self.search):
            domain = self.search[key]
            if domain.same_as is None and self._applies(domain, chosen):
                chosen[key] = pick(key, domain)
        for key, domain in self.search.items():
            if domain.same_as in chosen and self._applies(domain, chosen):
                chosen[key] = times(chosen[domain.same_as], domain.times)
        return {key: chosen[key] for key in self.search if key in chosen}

    def _applies(self, domain: Domain, chosen: Parameters) -> bool:
        for key, wanted in domain.when.items():
            value = chosen[key] if key in chosen else None if key in self.search else get(self.settings, key)
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
        """sha256 of all that makes it this sweep: it may go on with what FREE names changed."""
        tree = self.model_dump(mode="json", exclude=set(FREE), exclude_defaults=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def canonical(parameters: Parameters) -> str:
    """Text that is equal for equal points."""
    return json.dumps(parameters, sort_keys=True)


def get(settings: RunConfig, key: str) -> Any:
    """The value of `a.b`; None where a part is not there."""
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value
