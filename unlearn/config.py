"""RunConfig: one experiment, typed, validated whole, hashed.

YAML in (`load`), a frozen tree of small classes out. Every field states its meaning; `unlearn config schema` prints them.
"""

import difflib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from unlearn import config_hash, documents, patience, sizes
from unlearn.aliases import renamed
from unlearn.config_checks import contradictions
from unlearn.errors import ConfigError
from unlearn.registry import METHODS

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def location(uri: str) -> str:
    """One name for one place: a path is made absolute, since workers stand in other folders."""
    if uri.startswith("embedded:"):
        return uri
    if "://" in uri and not uri.startswith("file://"):
        return uri.rstrip("/")  # one folder has one name
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


# A path, file://, s3:// or embedded:NAME.
Location = Annotated[str, AfterValidator(location)]


def _bytes(given: Any) -> Any:
    return sizes.parse(given) if isinstance(given, str) else given


# Bytes: a number, or text like 512MiB.
Size = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(ge=0)]


class Part(BaseModel):
    """Base of all parts: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ViewSpec(Part):
    """A corruption T: which patches of the model's grid are hidden."""

    kind: Literal["centre", "outpaint", "random", "box", "brush"] = "centre"
    size: Share | tuple[Share, Share] = Field(
        0.5,
        description="centre, box: side of the hole / side of the image. outpaint: side of the visible middle / side of "
        "the image. random, brush: share of patches hidden. [low, high] draws one value a micro-batch.",
    )

    @property
    def name(self) -> str:
        size = "-".join(f"{s:g}" for s in self.size) if isinstance(self.size, tuple) else f"{self.size:g}"
        return f"{self.kind} {size}"

    @model_validator(mode="after")
    def _hides_something(self):
        low, high = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        if not 0 < low <= high < 1:
            raise ValueError(
                f"size {self.size}: give 0 < low <= high < 1, so that something is hidden and something seen"
            )
        return self


class Rows(Part):
    """Which rows of the shards form a set. All given conditions must hold; none given selects every row."""

    classes: list[int | str] | None = Field(
        default=None, description="labels (numbers), or names (text) as `unlearn shards inspect` tells them"
    )
    exclude_classes: list[int | str] | None = Field(default=None, description="rows of these classes are left out")
    ids: list[str] | None = Field(default=None, description="row ids (column `id`, else `shard:row`)")
    subjects: list[str] | None = Field(default=None, description="values of the column `subject`")
    per_class: Positive | None = Field(
        default=None, description="at most this many rows of each class, drawn with the seed"
    )
    limit: Positive | None = Field(default=None, description="at most this many rows in all, drawn with the seed")


class Data(Part):
    """Where the images are and which of them play which role."""

    train: Location = Field(description="folder of shards with a manifest: a path, s3://bucket/prefix or embedded:NAME")
    split: str | None = Field(
        default=None, description="where the folder of `train` holds several splits: the one that is meant"
    )
    forget: Rows | None = None
    retain: Rows | None = None
    proxy: Rows | None = Field(
        default=None, description="images that take the retain role where the retain data is gone"
    )
    proxy_data: Location | None = Field(default=None, description="shards of the proxy set, when not those of `train`")
    proxy_split: str | None = Field(default=None, description="as `split`, of the proxy set")
    cache: Literal["none", "encoded", "decoded"] = Field(
        default="encoded",
        description="images that a worker keeps in memory: as they are stored (encoded), or cut to size (decoded)",
    )
    cache_bytes: Size | None = Field(
        default=None,
        description="bytes, or text like 512MiB, that the caches of one worker may take, row groups and latents included; "
        "none = 2GiB, or a quarter of its part of the machine's memory where that is less",
    )
    latent_cache: Location | None = Field(
        default=None,
        description="folder that keeps what the frozen first stage (tokenizer, VAE) makes of each image; none = made every step",
    )
    latent_views: Positive = Field(
        default=8, description="with latent_cache: views drawn once and used in turn, each with latents of its own"
    )
    augment: Literal["none", "crop_flip"] = Field(
        default="none", description="crop_flip: random resized crop (0.2-1) and flip"
    )
    orientation: Literal["exif", "ignore"] = Field(
        default="exif", description="ignore: images are not turned upright, for models that were trained so"
    )
    shuffle_rows: Positive = Field(
        default=1 << 20, description="rows shuffled together; smaller reads fewer row groups at once"
    )
    decode_threads: Positive = 2
    read_ahead: Positive = Field(default=3, description="micro-batches kept ready")
    max_bad_images: int = Field(
        default=0, ge=0, description="images of one set that a worker may skip because they do not decode"
    )


class Model(Part):
    """The generator h0 = D after E0."""

    family: str = "mae"
    weights: Location | None = Field(
        default=None, description="what it starts from: path, s3:// or embedded:NAME; none = random"
    )
    first_stage: Location | None = Field(
        default=None, description="weights of the frozen first stage (tokenizer, VAE), where they lie apart"
    )
    variant: str | None = Field(default=None, description="a named shape of the family, see `unlearn models`")
    options: dict[str, Any] = Field(default_factory=dict, description="single values that differ from the variant's")


class Method(Part):
    """How it forgets: the base of the options that each method declares for itself, see `unlearn methods`."""

    name: str = "encoder_l2"


class Training(Part):
    """The optimisation."""

    engine: Literal["deepspeed", "torch"] = Field(default="deepspeed", description="torch: one plain process, no Ray")
    steps: Positive | None = Field(default=None, description="optimizer steps; or give epochs")
    epochs: float | None = Field(default=None, gt=0, description="passes over the larger of the two sets")
    batch_size: Positive = Field(default=64, description="rows of a global batch, forget and retain together")
    micro_batch_size: Positive | None = Field(
        default=None,
        description="rows a worker computes at once; default batch_size / workers. Keep it when workers change.",
    )
    forget_fraction: float = Field(default=0.5, ge=0, lt=1, description="share of forget rows in every micro-batch")
    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    clip: float = Field(default=3.0, ge=0, description="largest gradient norm; 0 = no clipping")
    ema: Decay | None = Field(
        default=None,
        description="decay of a moving average of the weights, as 0.9999: kept beside them and written as model_ema; none = not kept",
    )
    dtype: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = Field(default=False, description="optimizer state in host memory (ZeRO 1-3)")
    activation_checkpointing: bool = False
    checkpoint_every: Positive = Field(default=100, description="steps between checkpoints")
    keep_checkpoints: Positive = 2
    log_every: Positive = 10
    threads: Positive = Field(
        default=1, description="CPU threads of a worker's arithmetic; another number rounds otherwise"
    )


class Cluster(Part):
    """What the run asks Ray for."""

    address: str | None = Field(default=None, description="a Ray cluster's address; none = start one on this machine")
    workers: Positive = 1
    min_workers: Positive | None = Field(
        default=None,
        description="go on with so few where nodes are lost, and with more when they are back; none = wait for all",
    )
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    max_failures: int = Field(default=3, ge=-1, description="worker failures to recover from; -1 = without end")
    timeout: Positive = Field(
        default=1800,
        description="seconds that the workers wait for one of them; then it is named, and counts as a failure",
    )


class Evaluation(Part):
    """What is measured after training."""

    data: Location | None = Field(
        default=None, description="held-out shards; none = data.train, on the training images"
    )
    split: str | None = Field(default=None, description="the split that is measured, where a folder holds several")
    views: list[ViewSpec] = Field(
        default_factory=lambda: [ViewSpec(size=0.5), ViewSpec(size=0.25), ViewSpec(kind="random", size=0.5)],
        min_length=1,
    )
    features: str = Field(
        default="efficientnet_lite0", description="network that looks at images: efficientnet_lite0 | inception | clip"
    )
    features_weights: Location | None = Field(
        default=None, description="local weights of that network, where it does not bring its own"
    )
    resize: Literal["tf1", "clean"] = Field(
        default="tf1",
        description="how images get to Inception's size: tf1, as the original FID code and torch-fidelity; clean, as clean-fid, which the paper of the method used",
    )
    guidance_scale: float | None = Field(
        default=None,
        gt=0,
        description="how far a diffusion model's samples are led towards its prompt, away from the empty one; none = not at all",
    )
    oracle: Location | None = Field(
        default=None, description="weights of a model trained without the forget set, as the reference"
    )
    weights: Literal["trained", "ema"] = Field(
        default="trained",
        description="which weights of the run are measured: ema = their moving average (training.ema)",
    )
    limit: Positive | None = Field(default=None, description="images of each set at most")
    batch_size: Positive = 100
    workers: Positive | None = Field(default=None, description="default: cluster.workers")
    pictures: Positive = Field(default=8, description="rows of each picture grid")


class Storage(Part):
    """How S3 is used. Where it is and who asks is said by the usual AWS variables and files, never here."""

    patience: float | None = Field(
        default=None,
        ge=0,
        le=patience.MOST,
        description="seconds for which an outage of S3 is waited out; none = UNLEARN_STORAGE_PATIENCE, else 120",
    )


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
        # The class of a configuration depends on its method, so it is found again where it is unpickled. Nothing is validated
        # anew: a worker group that has lost a worker has a number of workers that no file may name.
        return _unpickled, (self.method.name, self.__getstate__())

    @property
    def micro_batch(self) -> int:
        """Rows a worker computes at once."""
        return self.training.micro_batch_size or max(1, self.training.batch_size // self.cluster.workers)

    @property
    def accumulation(self) -> int:
        """Micro-batches each worker computes for one optimizer step; the last ones may count for nothing, see training/loop.py."""
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
        places = {
            "run_dir": self.run_dir, "model.weights": m.weights, "model.first_stage": m.first_stage, "data.train": d.train, "data.proxy_data": d.proxy_data,
            "data.latent_cache": d.latent_cache, "evaluation.data": e.data, "evaluation.features_weights": e.features_weights, "evaluation.oracle": e.oracle,
        }  # fmt: skip
        return {key: uri for key, uri in places.items() if uri}

    def hash(self) -> str:
        """sha256 of what decides the weights, as far as it differs from the defaults: see unlearn/config_hash.py."""
        return config_hash.of(self)


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
    try:
        tree = documents.from_yaml(text) or {}
    except ValueError as e:
        raise ConfigError(f"config {source} is not YAML: {e}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {source}: expected keys and values at the top, found {type(tree).__name__}")
    return parse(override(tree, overrides), source)


def override(tree: dict, overrides: Sequence[str]) -> dict:
    """`tree` with each `a.b=value` set, parts made where they are missing."""
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
    return tree


def parse(tree: dict, source: str = "config") -> RunConfig:
    """Validate a tree of plain values, the options of its method among them. Raises ConfigError with every mistake, one a line."""
    tree = renamed(tree, source)
    method = tree.get("method")
    name = method.get("name", "encoder_l2") if isinstance(method, dict) else "encoder_l2"
    kind = _kind(str(name))
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        lines = [line for error in e.errors() for line in explain(error, kind)]
        raise ConfigError(
            f"{source}: " + ("; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines))
        ) from None


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
