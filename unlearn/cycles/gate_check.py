"""Whether the gate of a cycle asks for figures that its cycles measure: a mistake is told before anything is trained,
not after, as a refusal."""

import difflib

from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import NEW, OLD
from unlearn.errors import ConfigError
from unlearn.releases.figures import FIGURES, GENERATORS, UNLEARNED

SETS = ("forget", NEW, OLD, "retain")


def check(cycle: Cycle, source: str) -> None:
    """Raises ConfigError. Figures of an audit, and what is in metrics.json beside the rows, are not looked at."""
    settings = cycle.settings(0)
    views = ["", *(f".{view.name}" for view in settings.evaluation.views)]
    generators = (UNLEARNED, GENERATORS["base"])
    known = {f"metrics.{g}.{s}{v}.{figure}" for g in generators for s in SETS for v in views for figure in FIGURES}
    for name, rule in (cycle.rules or {}).items():
        generator, *rest = name.split(".")[1:]
        why = None
        if generator in (UNLEARNED, *GENERATORS.values()) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            why = "no cycle measures this" + (f"; did you mean {near[0]}?" if near else "")
        elif rule.optional:
            continue
        elif rule.oracle is not None:
            why = "oracle: no oracle knows what a cycle forgets: leave it out"
        elif OLD in rest:
            why = "the first cycle has no requests from before: add `optional: true`"
        elif rest and rest[-1].startswith("lpips") and settings.evaluation.lpips_weights is None:
            why = "LPIPS is not measured: give evaluation.lpips_weights"
        if why:
            raise ConfigError(f"{source}: gate: {name}: {why}")


def doubts(cycle: Cycle) -> list[str]:
    """What the gate asks for that only somebody else can put into the run folder: a cycle without an audit is refused,
    until there is one."""
    if cycle.audit is not None:
        return []
    names = [name for name, rule in (cycle.rules or {}).items() if name.startswith("audit.") and not rule.optional]
    return [f"gate: {name}: the cycle has no `audit`, so it is refused unless you audit its run" for name in names]
