"""The last cycle and the gate's verdicts in figures, as Prometheus reads them (text format 0.0.4)."""

from collections import Counter
from datetime import datetime

from unlearn.cycles import history
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import Records

RELEASED, DUE = "released", "retraining_due"


def text(cycle: Cycle) -> str:
    """How many cycles ended how, what the gate said, and when and how the last one ended."""
    every = history.of(Records(cycle.cycle_dir))
    ends = sorted((end for told in every for end in told.ends), key=lambda end: end.at)
    verdicts = Counter("passed" if judgement.passed else "refused" for told in every for judgement in told.tried)
    outcomes = Counter(DUE if end.due else RELEASED for end in ends)
    lines: list[str] = []

    def add(name: str, about: str, values: dict[str, float]) -> None:
        """values: by label, written out; "" for none."""
        lines.extend([f"# HELP {name} {about}", f"# TYPE {name} gauge"])
        label = f'{{cycle="{cycle.name}"'
        lines.extend(f"{name}{label}{f',{key}' if key else ''}}} {value}" for key, value in values.items())

    add(
        "unlearn_cycles", "Cycles by how they ended.", {f'outcome="{name}"': outcomes[name] for name in (RELEASED, DUE)}
    )
    add("unlearn_gate_verdicts", "Models that the gate of cycles has judged, by verdict.",
        {f'verdict="{name}"': verdicts[name] for name in ("passed", "refused")})  # fmt: skip
    add("unlearn_cycles_unfinished", "Cycles that were begun and have not ended.", {"": sum(not t.ends for t in every)})
    if ends:
        last = ends[-1]
        at = int(datetime.fromisoformat(last.at).timestamp())
        add("unlearn_last_cycle_timestamp_seconds", "When the last cycle ended, Unix time.", {"": at})
        add("unlearn_last_cycle_released", "1 where the last cycle released a model, 0 where retraining is due.",
            {"": int(not last.due)})  # fmt: skip
        add("unlearn_last_cycle_requests", "Requests that the last cycle was to serve.", {"": len(last.numbers)})
    return "\n".join(lines)
