"""The CYCLE.yaml as one value: how the deletion requests that have accumulated are served, again and again.

cycle_dir: runs/cycles
ledger: ledger.sqlite                        # else UNLEARN_LEDGER
releases: runs/releases
key: releases.key                            # else UNLEARN_RELEASE_KEY
run: jobs/configs/demo_fashion.yaml          # or the configuration itself; model.weights is the base
set: {evaluation.oracle: null}               # keys of it that are other here
gate: {metrics.unlearned.forget.cosine: {max: 0.7}}   # or the path of a file
ladder:                                      # what is tried one after the other where the gate refuses
  - {training.steps: 600}
  - {training.steps: 600, method.alpha: 1.0}
"""

import copy
import hashlib
from typing import Annotated, Any

import rfc8785
from pydantic import AfterValidator, Field

from unlearn import config
from unlearn.config import Location, Part, Rows, RunConfig, location
from unlearn.releases import gate as gates
from unlearn.run_files import put

KEY = "UNLEARN_RELEASE_KEY"  # the variable that names the private key


def _ledger(url: str) -> str:
    """A path is made absolute."""
    return url if "://" in url else location(url)


class Cycle(Part):
    """Serve deletion requests: which, how, how good the result must be, and where it goes."""

    name: str = Field(default="cycle", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    cycle_dir: Location = Field(description="everything that cycles write: a path or s3://bucket/prefix")
    ledger: Annotated[str, AfterValidator(_ledger)] | None = Field(
        default=None, description="path or URL of the ledger of requests, without a password; none = UNLEARN_LEDGER"
    )
    releases: Location = Field(description="where the releases of this model lie: a path or s3://bucket/prefix")
    key: Location | None = Field(default=None, description=f"path of the private key that signs releases; none = {KEY}")
    model_key: Location | None = Field(
        default=None,
        description="path of a private elliptic-curve key for a second signature, of the model (OpenSSF "
        "model-signing); none = not made",
    )
    run: dict[str, Any] = Field(
        description=(
            "a run's configuration, or the path of one: its model.weights is the base, its data.forget is replaced"
        )
    )
    gate: dict[str, Any] | None = Field(
        default=None, description="limits that a model must keep to be released, or the path of a file of them"
    )
    audit: dict[str, Any] | None = Field(
        default=None, description="how each rung is audited, as an AUDIT.yaml, or the path of one; none = not at all"
    )
    ladder: list[dict[str, Any]] = Field(
        default_factory=list,
        description="keys of the run and their values, tried one after the other where the gate refuses",
    )
    promote: bool = Field(default=True, description="whether the release becomes the current one")
    delete_rows: Location | None = Field(
        default=None, description="folder for copies of the shards without the rows that are served; none = not made"
    )

    @property
    def rungs(self) -> int:
        """How many configurations there are to try: that of the run, and those of the ladder."""
        return 1 + len(self.ladder)

    @property
    def rules(self) -> gates.Gate | None:
        """The gate, checked. Raises ConfigError."""
        return gates.parse(self.gate, f"cycle {self.name}: gate") if self.gate else None

    @property
    def base(self) -> str:
        """Where the weights lie that every cycle starts from. Raises ConfigError for a run that is none."""
        weights = self.settings(0).model.weights
        assert weights is not None, "checked where the file is read"
        return weights

    def settings(self, rung: int, forget: Rows | None = None, run_dir: str = "run") -> RunConfig:
        """The run of one rung, 0 being the run as it stands. Raises ConfigError."""
        tree = copy.deepcopy(self.run)
        for key, value in (self.ladder[rung - 1] if rung else {}).items():
            put(tree, key, copy.deepcopy(value))
        put(tree, "data.forget", forget.model_dump(exclude_none=True) if forget else None)
        put(tree, "run_dir", run_dir)
        return config.parse(tree, f"cycle {self.name}: " + (f"ladder, rung {rung}" if rung else "run"))

    def run_key(self, rung: int) -> str:
        """12 hex digits of what decides the weights of a rung, the requests and the data apart."""
        return self.settings(rung).hash()[:12]

    def identity(self) -> str:
        """12 hex digits of what decides how requests are served: the rungs, what is measured, the gate."""
        rungs = [self.settings(rung) for rung in range(self.rungs)]
        measured = [each.evaluation.model_dump(mode="json", exclude={"workers", "batch_size"}) for each in rungs]
        return digest(
            {"rungs": [each.hash() for each in rungs], "measured": measured, "audit": self.audit, "gate": self.gate}
        )


def digest(tree: Any) -> str:
    """12 hex digits of the sha256 of a value in canonical JSON (RFC 8785)."""
    return hashlib.sha256(rfc8785.dumps(tree)).hexdigest()[:12]
