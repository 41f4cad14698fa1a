"""The ledger in figures, as Prometheus reads them (text format 0.0.4)."""

from datetime import UTC, datetime

from unlearn.ledger.ledger import Ledger


def text(ledger: Ledger) -> str:
    """Requests by state, how many are open and overdue, and the day on which the first open one is due."""
    pending = ledger.pending()
    lines = ["# HELP unlearn_requests Deletion requests by state.", "# TYPE unlearn_requests gauge"]
    lines += [f'unlearn_requests{{state="{state}"}} {count}' for state, count in ledger.counts().items()]
    figures = {
        "unlearn_requests_pending": ("Requests that are not closed.", len(pending)),
        "unlearn_requests_overdue": ("Requests that are not closed and were due before today.",
            sum(r.is_overdue for r in pending)),
    }  # fmt: skip
    if pending:
        first = datetime.fromisoformat(min(request.due for request in pending)).replace(tzinfo=UTC)
        about = "When the first of the requests that are not closed is due, Unix time."
        figures["unlearn_requests_first_due_timestamp_seconds"] = (about, int(first.timestamp()))
    for name, (about, value) in figures.items():
        lines += [f"# HELP {name} {about}", f"# TYPE {name} gauge", f"{name} {value}"]
    return "\n".join(lines)
