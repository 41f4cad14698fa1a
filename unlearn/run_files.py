"""YAML files that say what is to be done with a run (sweeps, comparisons, cycles): read, changed, and the run put into
them."""

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlearn import config, method_options
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError

log = logging.getLogger(__name__)

OF_RUN = ("run.", "set.")  # what an override begins with that changes the run


def text(source: str, what: str) -> str:
    """What `source` holds: a file (path or s3://), or env:VARIABLE; `what` is expected there. Raises ConfigError,
    StorageError."""
    if source.startswith("env:"):
        variable = source.removeprefix("env:")
        if variable not in os.environ:
            raise ConfigError(f"{source}: this variable is not set; a {what} is expected in it")
        return os.environ[variable]
    return Storage(source).read().decode(errors="replace")


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A tree with "key=value" set, and with "run.key=value" or "set.key=value" among what it sets of its run."""
    of_run = [item for item in overrides if item.startswith(OF_RUN)]
    tree = config.override(tree, [item for item in overrides if item not in of_run])
    return into(tree, "set", of_run)


def into(tree: dict[str, Any], part: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A tree with each "PART.key=value" as one key of its part `part`, whatever dots it has."""
    for item in overrides:
        key, equals, value = item.partition(".")[2].partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item[:80]}: write it as key=value, for example --set run.training.steps=50")
        if not isinstance(there := tree.get(part) or {}, dict):
            raise ConfigError(f"--set {item[:80]}: {part} is one value here, without keys")
        tree = tree | {part: there | {key: config.override({}, [f"value={value}"])["value"]}}
    return tree


def with_run(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """A copy of `tree` with its run in it, changed as `set` says. Raises ConfigError."""
    tree = copy.deepcopy(tree)
    changes, run = tree.pop("set", None) or {}, inline(tree.get("run"), source, "run")
    if not isinstance(run, dict) or not run:
        raise ConfigError(f"{source}: run: give a run's configuration, or the path of one")
    if not isinstance(changes, dict):
        raise ConfigError(f"{source}: set: give keys of the run with their values, as in method.alpha: 0.5")
    former = method_options.name_in(run)
    for key, value in changes.items():
        _tell_of_lost(run.get(key), key, value)
        put(run, key, value)
    method_options.drop_former(run, former, changes)
    return tree | {"run": run}


def _tell_of_lost(former: Any, section: str, value: Any) -> None:
    """Warn where a section is set as a whole, in place of other keys of it. `method` tells of its own."""
    if section == "method" or not isinstance(former, dict) or not isinstance(value, dict):
        return
    if lost := ", ".join(sorted(f"{section}.{key}" for key in former.keys() - value.keys())):
        log.warning(
            "set: %s is set as a whole, so %s of the run's own are left out; `%s.KEY: VALUE` sets one key alone",
            section, lost, section,
        )  # fmt: skip


def inline(given: Any, source: str, key: str) -> Any:
    """The tree of a file that is given by its path, found from here or from beside the file `source`; other values as
    they are."""
    if not isinstance(given, str):
        return copy.deepcopy(given)
    beside = Path(source).parent / given if "://" not in source and not source.startswith("env:") else Path(given)
    path = given if "://" in given or Path(given).exists() or not beside.exists() else str(beside)
    if not Storage(path).is_file():
        raise ConfigError(f"{source}: {key}: there is no file {given}")
    return config.yaml_tree(Storage(path).read().decode(errors="replace"), f"{source}: {key}: {given}")


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b` of a tree, parts made where they are missing."""
    *path, last = key.split(".")
    for name in path:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value
