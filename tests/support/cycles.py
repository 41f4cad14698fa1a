"""A cycle on the small data set with the small model: seconds, on plain torch."""

from pathlib import Path
from typing import Any

from unlearn import certificate
from unlearn.cycles import cycle_file
from unlearn.cycles.cycle import Cycle
from unlearn.ledger.ledger import Ledger

LIMIT = "metrics.unlearned.retain.cosine"


def tiny_cycle(folder: Path, data: str, model: str, **changes: Any) -> Cycle:
    """A cycle below `folder`, with a pair of keys and a ledger of its own; two steps a rung, a gate that passes."""
    if not (folder / "releases.key").exists():
        certificate.generate(str(folder / "releases"))
        Ledger(str(folder / "ledger.sqlite"), create=True).database.close()
    run = {
        "seed": 3, "model": {"weights": model}, "data": {"train": data},
        "training": {"engine": "torch", "steps": 2, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 1, "log_every": 1},
        "evaluation": {"limit": 1, "views": [{"size": 0.5}]},  # of one image there is no FID, which takes seconds
    }  # fmt: skip
    return cycle_file.parse({
        "cycle_dir": str(folder / "cycles"), "ledger": str(folder / "ledger.sqlite"), "releases": str(folder / "store"),
        "key": str(folder / "releases.key"), "run": run, "gate": {LIMIT: {"min": -1.0}}, **changes,
    })  # fmt: skip


def written(cycle: Cycle) -> str:
    """The path of a YAML file that holds it."""
    path = Path(cycle.cycle_dir).with_name("cycle.yaml")
    path.write_text(cycle_file.dump(cycle))
    return str(path)


def ask(cycle: Cycle, *wanted: dict[str, list]) -> list[int]:
    """Record requests, each {"subjects" | "ids" | "classes": [...]}; their numbers."""
    with Ledger(cycle.ledger) as ledger:
        return ledger.add([{"forget": each} for each in wanted], by="test")


def standing(cycle: Cycle) -> dict[int, str]:
    """{number: state} of every request."""
    with Ledger(cycle.ledger) as ledger:
        return {request.id: request.state for request in ledger.requests()}
