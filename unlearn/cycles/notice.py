"""What a webhook tells of a cycle's requests, of its last cycle and of what the gate said; no name and no image id."""

from typing import Any

from unlearn.cycles import history
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.history import Told
from unlearn.cycles.records import Records
from unlearn.ledger import webhook
from unlearn.ledger.ledger import Ledger


def event(cycle: Cycle, ledger: Ledger) -> dict[str, Any]:
    """Requests as `unlearn.ledger.webhook.event` has them, with the cycle's name, and `last`: the newest cycle, None
    before the first."""
    every = history.of(Records(cycle.cycle_dir))
    requests = webhook.event(ledger) | {"type": "cycle", "cycle": cycle.name}
    return requests | {"last": _last(every[-1]) if every else None}


def _last(told: Told) -> dict[str, Any]:
    """ended, release: null where it has not ended; release also where retraining is due."""
    end = told.ends[-1] if told.ends else None
    return {
        "id": told.selection.id, "began": told.selection.at, "requests": told.selection.numbers,
        "unmatched": told.selection.unmatched,
        "ended": end and end.at, "release": end and end.release, "promoted": bool(end and end.promoted),
        "retraining_due": bool(end and end.due),
        "verdicts": [
            {
                "rung": one.rung, "passed": one.passed, "parent": one.parent,
                "reasons": [str(check) for check in (one.verdict.reasons if one.verdict else ())],
            }
            for one in told.tried
        ],
    }  # fmt: skip
