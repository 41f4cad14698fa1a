"""How things stand with the deletion requests: what the ledger and the cycle's records say, not what a scheduler
believes."""

from dataclasses import dataclass

from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import Outcome, Records, Selection
from unlearn.ledger.ledger import Ledger


@dataclass(frozen=True)
class Standing:
    """figures: requests by state, open ones and overdue ones. last: the newest cycle, None before the first; outcome:
    how it ended, None where it has not."""

    figures: dict[str, int]
    last: Selection | None
    outcome: Outcome | None

    @property
    def unfinished(self) -> bool:
        """Whether a cycle was begun that has not come to its end."""
        return self.last is not None and self.outcome is None

    def told(self) -> dict[str, str | int]:
        """What a person reads, by name."""
        if self.last is None:
            ended = "there was none"
        elif self.outcome is None:
            ended = f"{self.last.id} has not come to its end: the next run goes on with it"
        elif self.outcome.due:
            ended = f"{self.last.id} was given up: retraining is due"
        else:
            ended = f"{self.last.id} released {self.outcome.release}"
        return {"last cycle": ended, **self.figures}


def of(cycle: Cycle) -> Standing:
    """Raises UnlearnError where the ledger or the cycle's folder is out of reach."""
    records = Records(cycle.cycle_dir)
    with Ledger(cycle.ledger) as ledger:
        pending, counts = ledger.pending(), ledger.counts()
    last = max(records.all(), key=lambda selection: selection.at, default=None)
    ends = records.outcomes(last.id) if last else []
    figures = {"pending": len(pending), "overdue": sum(request.is_overdue for request in pending), **counts}
    return Standing(figures, last, ends[-1] if ends else None)
