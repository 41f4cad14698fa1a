"""PACK.yaml: what is packed into shards by many workers, and how; read and checked whole before anything starts."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Literal

import yaml
from pydantic import Field, model_validator

from unlearn import config
from unlearn.config import Cluster, Location, Part, Positive
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError

QUALITY = 95  # of the JPEGs that scaling makes, where nothing is said


class Packing(Part):
    """Images of a folder, tar or zip as shards. Its shards depend on everything here but `name` and `cluster`."""

    name: str = Field(default="pack", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    source: Location = Field(description="a folder, tar or zip of images, a path or s3://, that every worker reaches")
    dest: Location = Field(description="where the shards go: an empty folder, or s3://bucket/prefix")
    split: str | None = Field(default=None, description="take only images below a folder of this name")
    layout: Literal["folder", "imagenet", "places365", "webdataset"] | None = Field(
        default=None, description="how images and classes are laid out; guessed where it is plain"
    )
    labels: Location | None = Field(
        default=None, description="text file of labels: NAME LABEL a line, or LABEL in the order of the names"
    )
    classes: list[str] | None = Field(default=None, description="names of the labels 0, 1, ...")
    size: Positive | None = Field(
        default=None, description="images whose shorter side is larger are scaled to it; none = images stay as they are"
    )
    quality: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description=f"all images become JPEGs of this quality; {QUALITY} where they are scaled",
    )
    lossless: Literal["png", "webp"] | None = Field(
        default=None, description="all images become files of this kind, which lose nothing"
    )
    orientation: Literal["exif", "ignore"] = Field(
        default="exif", description="ignore: images that are written anew are not turned upright"
    )
    order: Literal["class", "shuffled"] = Field(
        default="class", description="by class, so that a class is read from few row groups; or shuffled by `seed`"
    )
    seed: int = Field(default=0, ge=0, description="of the shuffled order")
    rows_per_shard: Positive = 4096
    rows_per_group: Positive = Field(default=256, description="images of one row group, the unit of reading")
    leave_out_damaged: bool = Field(
        default=False, description="images that do not decode are left out, and counted; else they end the packing"
    )
    cluster: Cluster = Field(default_factory=Cluster)

    @model_validator(mode="after")
    def _whole(self):
        if self.quality is not None and self.lossless is not None:
            raise ValueError("quality is of JPEGs, and lossless names another kind: give one of them")
        if self.leave_out_damaged and not self.encodes:
            raise ValueError("leave_out_damaged: images are not decoded here; give size, quality or lossless")
        return self

    @property
    def encodes(self) -> bool:
        """Whether images are decoded and written anew."""
        return any(given is not None for given in (self.size, self.quality, self.lossless))

    def identity(self) -> str:
        """A hash of all that decides the shards."""
        tree = self.model_dump(mode="json", exclude={"name", "cluster", "dest"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    # What a job that is sent elsewhere is asked for, as of a RunConfig.

    @property
    def run_dir(self) -> str:
        return self.dest

    @property
    def names_rows(self) -> bool:
        return False

    def locations(self) -> dict[str, str]:
        """Every place that the packing reads or writes, by its key."""
        places = {"source": self.source, "dest": self.dest, "labels": self.labels}
        return {key: uri for key, uri in places.items() if uri}

    def elsewhere(self) -> "Packing":
        """The same for a job that finds its Ray cluster where it runs."""
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"address": None})})


def load(source: str, overrides: Sequence[str] = ()) -> Packing:
    """The packing that `source` names: a YAML file (path or s3://), or env:VARIABLE. Raises ConfigError,
    StorageError."""
    if source.startswith("env:"):
        variable = source.removeprefix("env:")
        if variable not in os.environ:
            raise ConfigError(f"{source}: this variable is not set; a packing is expected in it")
        return read(os.environ[variable], source, overrides)
    return read(Storage(source).read().decode(errors="replace"), source, overrides)


def read(text: str, source: str, overrides: Sequence[str] = ()) -> Packing:
    """The same from the text of a file; `source` names it in messages. overrides: "key=value"."""
    tree = config.override(config.yaml_tree(text, f"packing {source}"), overrides)
    return config.validated(Packing, tree, source)


def dump(packing: Packing) -> str:
    """The packing as YAML."""
    return yaml.safe_dump(packing.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
