"""What an audit is asked to do: AUDIT.yaml, typed and validated whole. It is no part of a run's configuration, since it
decides nothing of the weights; the options of each test are declared beside the test.
"""

import functools
from collections.abc import Sequence
from typing import Any

from pydantic import Field, create_model, field_validator

from unlearn import config
from unlearn.config import Location, Part, Positive
from unlearn.registry import AUDITS

# Made unless AUDIT.yaml says otherwise; the others need what not every run has.
USUAL = ("transfer", "membership", "probes", "relearning", "streisand")


class AuditConfig(Part):
    """One audit; each test of registry.AUDITS adds its options under its name."""

    tests: list[str] = Field(
        default_factory=lambda: list(USUAL), description="those that are made, in this order", min_length=1
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of views, samples, probes and intervals")
    limit: Positive = Field(default=1000, description="images of each kind at most, drawn with the seed")
    confidence: float = Field(
        default=0.95, gt=0.5, le=0.95, description="of the intervals; more than 0.95 few draws of training cannot give"
    )
    resamples: int = Field(default=1000, ge=100, description="draws of the bootstrap")
    batch_size: Positive = Field(default=250, description="images that a worker measures at once")
    workers: Positive | None = Field(default=None, description="default: as the evaluation of the run")
    unseen: Location | None = Field(
        default=None,
        description=(
            "shards of classes that neither the original nor the oracle has seen; none = retained images "
            "laid on their side"
        ),
    )
    shadows: Location | None = Field(
        default=None, description="folder of the shadow models that `unlearn audit shadows` has trained"
    )

    def __reduce__(self):
        # Its class is made anew in every process, so it is found again where it is unpickled.
        return _unpickled, (self.__getstate__(),)

    @field_validator("tests")
    @classmethod
    def _known(cls, tests: list[str]) -> list[str]:
        for name in tests:
            AUDITS.load(name)
        if len(set(tests)) < len(tests):
            raise ValueError("a test is named twice")
        return tests


def _unpickled(state: dict[str, Any]) -> AuditConfig:
    settings = kind().__new__(kind())
    settings.__setstate__(state)
    return settings


@functools.cache
def kind() -> type[AuditConfig]:
    """AuditConfig with the options of every test."""
    parts: dict[str, Any] = {}
    for name in AUDITS:
        options = AUDITS.load(name).Options
        parts[name] = (options, Field(default_factory=options))
    return create_model("AuditConfig", __base__=AuditConfig, __module__=__name__, **parts)


def load(source: str | None = None, overrides: Sequence[str] = ()) -> AuditConfig:
    """The audit of a YAML file (path or s3://), by default the usual one. overrides: "membership.views=16". Raises
    ConfigError."""
    tree: dict[str, Any] = {}
    if source is not None:
        from unlearn.data.storage import Storage

        tree = config.yaml_tree(Storage(source).read().decode(errors="replace"), f"audit {source}")
    return parse(config.override(tree, overrides), source or "audit")


def parse(tree: dict[str, Any], source: str = "audit") -> AuditConfig:
    """The same from plain values. Raises ConfigError with every mistake."""
    return config.validated(kind(), tree, source)
