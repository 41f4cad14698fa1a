"""What a cycle measures beside the forget and the retain set: new requests apart from those that were served before."""

from collections.abc import Iterable
from dataclasses import replace

from unlearn.config import Rows
from unlearn.cycles.records import NEW, OLD
from unlearn.data import held_out, selection
from unlearn.data.selection import RowSet
from unlearn.ledger.request import Request
from unlearn.run import Run


def with_parts(run: Run, new: Rows | None, old: Rows | None, requests: Iterable[Request]) -> Run:
    """The same run, which also measures `forget_new` and, where there is something, `forget_old`; each as a forget set
    of its own would be: on held-out images of its classes where it is chosen by class.

    requests: all that the rows stand for. Images of a class that one of them names are no retain images, held out or
    not.
    """
    sets = dict(run.measured)
    for name, rows in ((NEW, new), (OLD, old)):
        if rows is not None:
            sets[name] = _measured(run, rows)["forget"]
    classes = [c for request in requests for c in (request.forget or {}).get("classes", ())]
    if classes and run.settings.data.forget != (whole := Rows(classes=list(dict.fromkeys(classes)))):
        sets["retain"] = _measured(run, whole)["retain"]
    return replace(run, measured=sets)


def _measured(run: Run, rows: Rows) -> dict[str, RowSet]:
    """What would be measured if these rows alone were forgotten."""
    data = run.settings.data.model_copy(update={"forget": rows})
    forget = selection.select(run.sets["forget"].manifest, rows, run.settings.seed, "forget")
    return held_out.sets(
        run.settings.model_copy(update={"data": data}), {"forget": forget, "retain": run.sets["retain"]}
    )
