"""Requests that are released and that the current release does not serve: told after every cycle."""

from collections.abc import Iterator

from unlearn.cycles.cycle import Cycle
from unlearn.ledger import states
from unlearn.ledger.ledger import Ledger
from unlearn.releases import pointer
from unlearn.releases.store import Store


def told(cycle: Cycle) -> Iterator[str]:
    """A sentence for the requests of each release that would serve them, and one for those that none does."""
    store = Store(cycle.releases)
    state = pointer.read(store)
    served, others = pointer.served(store, state)
    numbers: dict[str, list[int]] = {}
    with Ledger(cycle.ledger) as ledger:
        for request in ledger.requests([states.RELEASED]):
            if request.commitment not in served:
                last = (others.get(request.commitment) or [""])[-1]
                numbers.setdefault(last, []).append(request.id)
    for version, own in numbers.items():
        start = f"request(s) {', '.join(map(str, own))} were served, but not by the current release, "
        start += f"which is {state.version}: " if state.version else "since none is: "
        if version:
            yield f"{start}`unlearn release promote {version}` makes one current that serves them"
        else:
            yield (
                f"{start}no release serves them that is not withdrawn. Record one of them again (`unlearn request "
                "add`): the next cycle serves all of them"
            )
