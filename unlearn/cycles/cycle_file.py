"""CYCLE.yaml: read, and checked whole, every rung of its ladder too, before anything starts."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from unlearn import config, run_files
from unlearn.cycles import gate_check
from unlearn.cycles.cycle import Cycle
from unlearn.errors import ConfigError
from unlearn.registry import METHODS

# Keys of the run that a cycle sets itself, or that do not go with it, and why.
SET_APART = {
    "data.forget": "it is what the requests name",
    "run_dir": "each rung has a run folder in cycle_dir",
    "model.weights": "every rung starts from the base, that of the run",
    "data.train": "every rung is trained on the data that the requests were looked up in",
    "evaluation": "every rung is measured alike",
    "data.split": "every rung is trained on the data that the requests were looked up in",
}


def load(source: str, overrides: Sequence[str] = ()) -> Cycle:
    """The cycle that `source` names: a YAML file (path or s3://), or env:VARIABLE. overrides: "key=value" of the cycle,
    and "run.key=value" of its run. Raises ConfigError, StorageError."""
    return read(run_files.text(source, "cycle"), source, overrides)


def read(text: str, source: str, overrides: Sequence[str] = ()) -> Cycle:
    """The same from the text of a file; `source` names it in messages."""
    return parse(run_files.overridden(config.yaml_tree(text, f"cycle {source}"), overrides), source)


def parse(tree: dict[str, Any], source: str = "cycle") -> Cycle:
    """Validate a tree of plain values, the run with every rung, and the gate. Raises ConfigError."""
    tree = run_files.with_run(tree, source)
    run = tree["run"]
    if isinstance(run.get("data"), dict):
        run["data"].pop("forget", None)
    run.pop("run_dir", None)
    # Checked here, where no message repeats it.
    if re.match(r"[^/]*//([^/@]*:[^/]*@|.*[?&](ssl)?password=)", str(tree.get("ledger"))):
        raise ConfigError(f"{source}: ledger: a password does not belong here: give it by PGPASSWORD or ~/.pgpass")
    tree |= {key: run_files.inline(tree.get(key), source, key) for key in ("gate", "audit")}
    cycle = config.validated(Cycle, tree, source)
    _check(cycle, source)
    return cycle


def dump(cycle: Cycle) -> str:
    """The cycle as YAML, its run and gate inline; it holds no key and names no request."""
    return yaml.safe_dump(cycle.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def _check(cycle: Cycle, source: str) -> None:
    """Raises ConfigError where the run, a rung or the gate cannot be."""
    for number, rung in enumerate(cycle.ladder, 1):
        if not rung:
            raise ConfigError(f"{source}: ladder, rung {number}: it changes nothing; give keys of the run and values")
        for key in rung:
            for apart, why in SET_APART.items():
                if key == apart or apart.startswith(f"{key}.") or key.startswith(f"{apart}."):
                    raise ConfigError(f"{source}: ladder, rung {number}: {key} is not to be set: {why}")
    for number in range(cycle.rungs):
        settings = cycle.settings(number)
        where = f"{source}: " + (f"ladder, rung {number}" if number else "run")
        if not METHODS.load(settings.method.name).needs_forget:
            raise ConfigError(f"{where}: method {settings.method.name} forgets nothing")
        if settings.model.weights is None:
            raise ConfigError(f"{where}: model.weights is missing: it is the base that every cycle starts from")
        if settings.data.retain is not None:
            raise ConfigError(
                f"{where}: data.retain is not to be set: every image is retained that nobody asks to forget, and that "
                "changes with every request; leave it out, or give data.proxy"
            )
        if settings.evaluation.oracle is not None:
            raise ConfigError(
                f"{where}: evaluation.oracle is not to be set: a cycle forgets what no oracle was trained without; "
                "leave it out"
            )
    keys = [cycle.run_key(rung) for rung in range(cycle.rungs)]
    for number, key in enumerate(keys):
        if (before := keys.index(key)) < number:
            same = f"rung {before}" if before else "the run as it stands"
            raise ConfigError(f"{source}: ladder, rung {number}: it would make the same model as {same}")
    gate_check.check(cycle, source)
