"""What a cycle needs that is served by a pipeline in a cluster: places that its pods can reach, and a file that they
can read."""

import hashlib

from pipelines.place import IMAGE, Place
from unlearn.audit.settings import parse
from unlearn.cycles import cycle_file
from unlearn.cycles.cycle import Cycle
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError

PARAMETERS = ("overlay", "namespace", "priority")  # of the pipeline, beside the cycle and where to train
FILES = "files"  # the folder in cycle_dir


def check(cycle: Cycle, place: Place, mounted: bool = False) -> None:
    """mounted: paths are of a volume that every node has. Raises ConfigError where a step in a cluster would miss
    something."""
    parse(cycle.audit or {}, f"cycle {cycle.name}: audit")
    places = {"cycle_dir": cycle.cycle_dir, "releases": cycle.releases}
    places |= {f"run.{key}": uri for key, uri in cycle.settings(0).locations().items() if key != "run_dir"}
    for key, uri in places.items():
        if not mounted and not uri.startswith("embedded:") and Storage(uri).is_local():
            raise ConfigError(
                f"{key} {uri} is a path of this machine, and the steps run on others: give s3://bucket/prefix, or "
                "--mounted"
            )
    if place.image == IMAGE:
        raise ConfigError("give --image: what the steps run in, this software with the extras of infra/Dockerfile")
    if cycle.key or not place.key:
        raise ConfigError(
            "the private key is to come from a Secret: leave `key` out of the cycle, and give --key SECRET/KEY"
        )
    in_env = any(variable == "UNLEARN_LEDGER" for variable, *_ in place.secrets)
    if cycle.ledger is None and not in_env:
        raise ConfigError("no ledger is named: give `ledger` in the cycle, or --secret UNLEARN_LEDGER=SECRET/KEY")
    if cycle.ledger and not cycle.ledger.startswith("postgresql") and not mounted:
        raise ConfigError(
            f"ledger {cycle.ledger} is a file of this machine, and the steps run on others: give "
            "postgresql://HOST/DATABASE"
        )


def source(cycle: Cycle, given: str) -> str:
    """Where the steps read the cycle's file: a URI as it is given, which may be changed there later; a file of this
    machine as a copy in cycle_dir that never changes. It names no request and no person. Raises StorageError."""
    if "://" in given and not given.startswith("file://"):
        return given
    data = cycle_file.dump(cycle).encode()
    folder, name = Storage(cycle.cycle_dir), f"{FILES}/{hashlib.sha256(data).hexdigest()[:16]}.yaml"
    folder.create(name, data)
    return folder.where(name)


def parameters(given: list[str]) -> dict[str, str]:
    """NAME=VALUE, as the pipeline takes them. Raises ConfigError."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in PARAMETERS or not value:
            raise ConfigError(f"--parameter {text}: give NAME=VALUE, one of {', '.join(PARAMETERS)}")
        found[name] = value
    return found
