"""RunConfig: one experiment, typed, validated whole, hashed.

YAML in (`load`), a frozen tree of small classes out. Every field states its meaning; `unlearn config schema` prints
them.
"""

import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from unlearn import config_hash, documents, method_options
from unlearn.aliases import renamed
from unlearn.config_checks import contradictions
from unlearn.config_parts import (
    Cluster,
    Data,
    Evaluation,
    Location,
    Method,
    Model,
    Part,
    Positive,
    Rows,
    Storage,
    Training,
    ViewSpec,
    location,
)
from unlearn.errors import ConfigError
from unlearn.registry import METHODS

P = TypeVar("P", bound=Part)
# The parts are known by this name too: a user of a configuration needs one import.
__all__ = ["Cluster", "Data", "Evaluation", "Location", "Method", "Model", "Part", "Positive", "Rows", "RunConfig",
    "Storage", "Training",
           "ViewSpec", "dump", "explain", "json_schema", "load", "location", "override", "parse", "read", "unknown_key",
           "yaml_tree"]  # fmt: skip


class RunConfig(Part):
    """One experiment."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    run_dir: Location = Field(description="everything the run writes: a path or s3://bucket/prefix")
    model: Model = Field(default_factory=Model)
    data: Data
    train_views: list[ViewSpec] = Field(
        default_factory=lambda: [
            ViewSpec(kind="random", size=(0.25, 0.75)),
            ViewSpec(size=0.5),
            ViewSpec(kind="box", size=(0.25, 0.6)),
        ],
        description="one of them is drawn for every micro-batch",
        min_length=1,
    )
    method: Method = Field(default_factory=Method)
    training: Training = Field(default_factory=Training)
    cluster: Cluster = Field(default_factory=Cluster)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    storage: Storage = Field(default_factory=Storage)

    @model_validator(mode="after")
    def _whole(self):
        if wrong := list(contradictions(self)):
            raise ValueError("\n".join(wrong))
        return self

    def __reduce__(self):
        # The class of a configuration depends on its method, so it is found again where it is unpickled. Nothing is
        # validated anew: a worker group that has lost a worker has a number of workers that no file may name.
        return _unpickled, (self.method.name, self.__getstate__())

    @property
    def micro_batch(self) -> int:
        """Rows a worker computes at once."""
        return self.training.micro_batch_size or max(1, self.training.batch_size // self.cluster.workers)

    @property
    def accumulation(self) -> int:
        """Micro-batches each worker computes for one optimizer step; the last ones may count for nothing, see
        training/loop.py."""
        return -(-self.training.batch_size // (self.micro_batch * self.cluster.workers))

    @property
    def names_rows(self) -> bool:
        """Whether it names single images or persons: such a file is for its owner alone, and is written to no log."""
        sets = (self.data.forget, self.data.retain, self.data.proxy)
        return any(rows is not None and bool(rows.ids or rows.subjects) for rows in sets)

    def elsewhere(self) -> "RunConfig":
        """The same for a job that finds its Ray cluster where it runs."""
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"address": None})})

    def locations(self) -> dict[str, str]:
        """Every place that the run reads or writes, by its key."""
        m, d, e = self.model, self.data, self.evaluation
        places: dict[str, str | None] = {
            "run_dir": self.run_dir, "model.weights": m.weights, "model.first_stage": m.first_stage,
            "data.train": d.train, "data.proxy_data": d.proxy_data,
            "data.latent_cache": d.latent_cache, "evaluation.data": e.data,
            "evaluation.features_weights": e.features_weights,
            "evaluation.lpips_weights": e.lpips_weights,
        }  # fmt: skip
        sets = {"forget": d.forget, "retain": d.retain, "proxy": d.proxy}
        places |= {f"data.{name}.ids_from": rows.ids_from for name, rows in sets.items() if rows is not None}
        numbered = enumerate(e.oracles) if isinstance(e.oracle, list) else ()
        places |= {f"evaluation.oracle.{number}": uri for number, uri in numbered} or {
            "evaluation.oracle": next(iter(e.oracles), None)
        }
        return {key: uri for key, uri in places.items() if uri}

    def hash(self, step: int | None = None) -> str:
        """sha256 of what decides the weights, or those behind a step, as far as it differs from the defaults: see
        unlearn/config_hash.py."""
        return config_hash.of(self, step)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `a.b=value` overrides (values are YAML too). Raises ConfigError."""
    try:
        return read(Path(path).read_text(), str(path), overrides)
    except OSError as e:
        raise ConfigError(f"config {path}: {e.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is not text") from None


def read(text: str, source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The same from the text of a file; `source` names it in messages."""
    return parse(override(yaml_tree(text, f"config {source}"), overrides), source)


def yaml_tree(text: str, what: str) -> dict[str, Any]:
    """Keys and values of a YAML document, `what` in messages. Raises ConfigError."""
    try:
        values = documents.from_yaml(text) or {}
    except ValueError as e:
        raise ConfigError(f"{what} is not YAML: {e}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: expected keys and values at the top, found {type(values).__name__}")
    return values


def override(tree: dict, overrides: Sequence[str]) -> dict:
    """`tree` with each `a.b=value` set, parts made where they are missing. With another method, options of the former
    one go."""
    former = method_options.name_in(tree)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: write it as key=value, for example --set method.alpha=0.5")
        node, path = tree, key.split(".")
        if len(path) > documents.DEPTH:
            raise ConfigError(f"--set {item[:40]}...: a key of {len(path)} parts; there is none so deep")
        for name in path[:-1]:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        try:
            node[path[-1]] = documents.from_yaml(text)
        except ValueError as e:
            raise ConfigError(f"--set {item[:80]}: the value is not YAML ({e})") from None
    method_options.drop_former(tree, former, [item.partition("=")[0] for item in overrides])
    return tree


def parse(tree: dict, source: str = "config") -> RunConfig:
    """Validate a tree of plain values, the options of its method among them. Raises ConfigError with every mistake, one
    a line."""
    tree = renamed(tree, source)
    return validated(_kind(method_options.name_in(tree)), tree, source)


def _unpickled(method: str, state: dict[str, Any]) -> RunConfig:
    kind = _kind(method)
    settings = kind.__new__(kind)
    settings.__setstate__(state)
    return settings


@functools.cache
def _kind(method: str) -> type[RunConfig]:
    """RunConfig with the options of a method. Raises ConfigError for an unknown one."""
    options = METHODS.load(method).Options
    return create_model(
        "RunConfig", __base__=RunConfig, __module__=__name__, method=(options, Field(default_factory=options))
    )


def validated(kind: type[P], tree: dict[str, Any], source: str) -> P:
    """A value of this kind from plain values. Raises ConfigError, with a line for each mistake after `source`."""
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        lines = [line for error in e.errors() for line in explain(error, kind)]
        raise ConfigError(
            f"{source}: " + ("; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines))
        ) from None


def explain(error: Any, kind: type[Part]) -> list[str]:
    """One line for each mistake that an error of pydantic tells."""
    path = [str(p) for p in error["loc"] if not str(p).startswith(("tuple[", "constrained-"))]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _fields(path[:-1], kind)
        close = difflib.get_close_matches(path[-1], known, n=1)
        return [
            f"{where}: unknown key" + (f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}")
        ]
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (given: {given!r})" if isinstance(given, int | float | str | bool) and error["type"] != "missing" else ""
    return [f"{where}: {line}{shown}" if where else line for line in message.split("\n")]


def _fields(path: list[str], kind: type[Part]) -> list[str]:
    """Names that the part at `path` knows."""
    part: Any = kind
    for name in path:
        if name.isdigit():
            continue
        annotation = part.model_fields[name].annotation if name in part.model_fields else None
        kinds = [annotation, *getattr(annotation, "__args__", ())]
        part = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), part)
    return list(part.model_fields)


def unknown_key(key: str, method: str) -> str | None:
    """What is wrong with the key `a.b` of a configuration with this method; None where there is such a key."""
    part: Any = _kind(method)
    for name in key.split("."):
        fields = getattr(part, "model_fields", None)
        if fields is None:  # within a value, such as model.options
            return None
        if name not in fields:
            close = difflib.get_close_matches(name, list(fields), n=1)
            return f"no such key with method {method}" + (
                f"; did you mean {close[0]}?" if close else f"; known there: {', '.join(fields)}"
            )
        annotation = fields[name].annotation
        kinds = [annotation, *getattr(annotation, "__args__", ())]
        part = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if part is None and dict not in kinds and not any(getattr(k, "__origin__", None) is dict for k in kinds):
            part = _Leaf
    return None


class _Leaf(Part):
    """A value that has no keys."""


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def json_schema() -> dict[str, Any]:
    """The JSON schema of configurations, with the options of every method."""
    schema = RunConfig.model_json_schema()
    methods = {name: METHODS.load(name).Options.model_json_schema() for name in METHODS}
    for name, options in methods.items():
        options["properties"]["name"] = {"const": name, "default": name}
    schema["properties"]["method"] = {"oneOf": list(methods.values())}
    schema["$defs"].pop("Method", None)
    return schema
