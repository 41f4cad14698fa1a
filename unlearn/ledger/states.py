"""The states of a deletion request, and which may follow which."""

from unlearn.errors import LedgerError

RECEIVED, SCHEDULED, TRAINED, VERIFIED, RELEASED = "received", "scheduled", "trained", "verified", "released"
REJECTED, WITHDRAWN = "rejected", "withdrawn"

# A cycle that ends without a release hands its requests back, to be served by the next one: that is the way to
# `received`.
NEXT: dict[str, tuple[str, ...]] = {
    RECEIVED: (SCHEDULED, REJECTED, WITHDRAWN),
    SCHEDULED: (TRAINED, RECEIVED, REJECTED, WITHDRAWN),
    TRAINED: (VERIFIED, RECEIVED, REJECTED, WITHDRAWN),
    VERIFIED: (RELEASED, RECEIVED, REJECTED, WITHDRAWN),
    RELEASED: (),
    REJECTED: (),
    WITHDRAWN: (),
}
STATES = tuple(NEXT)
OPEN = tuple(state for state, following in NEXT.items() if following)
CLOSED = tuple(state for state, following in NEXT.items() if not following)


def check(request: int, before: str, after: str) -> None:
    """Raises LedgerError where `after` may not follow `before`."""
    if after not in NEXT:
        raise LedgerError(f"{after!r} is no state of a request; the states are {', '.join(STATES)}")
    if after not in NEXT[before]:
        allowed = f"it can become {', '.join(NEXT[before])}" if NEXT[before] else "that is final"
        raise LedgerError(f"request {request} is {before} and cannot become {after}: {allowed}")
