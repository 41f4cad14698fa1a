"""SWEEP.yaml: read, and checked whole, with every key and value that is searched, before anything starts."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from unlearn import config, method_options, run_files
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.registry import METHODS
from unlearn.search.domain import Domain
from unlearn.search.objectives import check_name
from unlearn.search.space import Sweep

# Keys of a run that a sweep sets itself, and how.
SET_APART = {
    "seed": "name the seeds in `seeds`",
    "model.weights": "name the originals in `models`",
    "run_dir": "each trial has a run folder in sweep_dir",
    "name": "each trial has a name of its own",
    "cluster": "every trial takes what the run's `cluster` says",
    "evaluation": "every trial is measured as the run's `evaluation` and `tune_on` say",
    "training.engine": "every trial runs on the engine that the run names",
    "training.lr_changes": "search_by: pbt finds them",
}
# Parts whose own keys have dots.
DOTTED = ("search.", "objectives.")


def load(source: str, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep that `source` names: a YAML file (path or s3://), the folder of a sweep, or env:VARIABLE. overrides:
    "key=value" of the sweep, and "run.key=value" of its run. Raises ConfigError, StorageError."""
    if source.startswith("env:"):
        return read(run_files.text(source, "sweep"), source, overrides)
    if Path(source).suffix not in (".yaml", ".yml"):
        if not Storage(source).is_file("sweep.yaml"):
            raise ConfigError(f"{source}: neither a YAML file nor the folder of a sweep (no sweep.yaml in it)")
        source = Storage(source).where("sweep.yaml")
    return read(run_files.text(source, "sweep"), source, overrides)


def read(text: str, source: str, overrides: Sequence[str] = ()) -> Sweep:
    """The same from the text of a file; `source` names it in messages."""
    tree = config.yaml_tree(text, f"sweep {source}")
    dotted = [item for item in overrides if item.startswith(DOTTED)]
    tree = run_files.overridden(tree, [item for item in overrides if item not in dotted])
    for item in dotted:
        tree = run_files.into(tree, item.partition(".")[0], [item])
    return parse(tree, source)


def parse(tree: dict, source: str = "sweep") -> Sweep:
    """Validate a tree of plain values, and every key and value that is searched. Raises ConfigError."""
    sweep = config.validated(Sweep, run_files.with_run(tree, source), source)
    _check(sweep, source)
    return sweep


def dump(sweep: Sweep) -> str:
    """The sweep as YAML, its run inline."""
    return yaml.safe_dump(sweep.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def _check(sweep: Sweep, source: str) -> None:
    """Raises ConfigError where the run is not valid, and for keys, values, figures and bounds that cannot be."""
    for key, domain in sweep.search.items():
        where = f"{source}: search.{key}"
        for apart, why in SET_APART.items():
            if key == apart or key.startswith(f"{apart}."):
                raise ConfigError(f"{where}: not to be searched: {why}")
        _check_key(sweep, key, where)
        for other in domain.when:
            if other not in sweep.search:
                _check_key(sweep, other, f"{where}.when")
        _check_values(sweep, key, domain, where)
    held_out, tune_on = sweep.run.get("evaluation") or {}, sweep.tune_on
    if (tune_on.data or tune_on.split) and held_out.get("split") == tune_on.split:
        if (config.location(held_out["data"]) if held_out.get("data") else None) == tune_on.data:
            raise ConfigError(
                f"{source}: tune_on names the images of run.evaluation: those are held out, to tell of the result"
            )
    settings = sweep.settings
    if not METHODS.load(settings.method.name).needs_forget:
        raise ConfigError(
            f"{source}: run.method {settings.method.name} forgets nothing: there is no trade-off to search"
        )
    if sweep.search_by == "pbt" and settings.training.lr_changes:
        raise ConfigError(f"{source}: run.training.lr_changes: search_by pbt finds them; leave them out")
    for objective in sweep.wanted:
        check_name(objective.figure, settings, f"{source}: objectives")
    try:
        bounds = sweep.bounds
    except ConfigError as e:
        raise ConfigError(f"{source}: constraints: {e}") from None
    for bound in bounds:
        check_name(bound.figure, settings, f"{source}: constraints")


def _check_key(sweep: Sweep, key: str, where: str) -> None:
    """Raise ConfigError for a key that the run cannot have, with any of the methods that the sweep may give it."""
    domain = sweep.search.get("method.name")
    names = domain.values if domain and domain.values else [method_options.name_in(sweep.run)]
    try:
        faults = [fault for name in names if (fault := config.unknown_key(key, str(name)))]
    except ConfigError as e:  # there is no such method
        raise ConfigError(f"{where}: {e}") from None
    if len(faults) == len(names):
        raise ConfigError(f"{where}: {faults[0]}")


def _check_values(sweep: Sweep, key: str, domain: Domain, where: str) -> None:
    """Raise ConfigError where the run refuses a value of the key for the key's own sake."""
    conditions = {other: (wanted[0] if isinstance(wanted, list) else wanted) for other, wanted in domain.when.items()}
    if (
        key.startswith("method.")
        and key != "method.name"
        and "method.name" in sweep.search
        and "method.name" not in conditions
    ):
        conditions["method.name"] = next(
            n for n in sweep.search["method.name"].values or [] if not config.unknown_key(key, str(n))
        )
    if key.startswith("training.") and key.rpartition(".")[2] in ("steps", "epochs"):
        conditions["training.epochs" if key.endswith("steps") else "training.steps"] = None
    for value in domain.values or domain.ends or ():
        try:
            sweep.of(conditions | {key: value}, *sweep.pairs()[0], "run")
        except ConfigError as e:
            lines = (line.strip().removeprefix("run: ") for line in str(e).splitlines())
            if fault := next((line for line in lines if line.startswith(key)), None):
                raise ConfigError(f"{where}: {fault.removeprefix(key).lstrip(': ')}") from None
