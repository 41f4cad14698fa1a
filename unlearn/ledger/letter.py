"""What the person who asked is told: plain text, from the ledger alone."""

from unlearn.ledger import entry, states
from unlearn.ledger.ledger import Ledger
from unlearn.ledger.request import Request

DONE = {
    states.RECEIVED: "Your request was received.",
    states.SCHEDULED: "It was taken into the next run that removes the influence of images from our models.",
    states.TRAINED: "A new version of the model was trained to forget the images.",
    states.VERIFIED: "It was measured whether the new version still shows their influence.",
    states.RELEASED: "The new version of the model replaced the one before.",
    states.REJECTED: "Your request was rejected.",
    states.WITHDRAWN: "Your request was withdrawn.",
    entry.ERASED: "What your request named was erased from our records; an anonymous trace of it stays.",
}
NOT_CURRENT = "A new version of the model was released; at that time the one before was still the current one."
BACK = "The run ended without a new version of the model; your request waits for the next one."
OPEN = "Your request is not finished; it is due on {due}."
OVERDUE = "Your request is not finished, and should have been by {due}."
ASKED = {"subjects": "the images of the subject that you named", "classes": "the class of images that you named"}
CLAIMS = """What we do not claim:
- Forgetting by training is measured, not proved: we cannot exclude that someone finds traces of an image in the model.
- It says nothing of copies that others made of the images, or of models that others trained.
- Earlier versions of the model that others have received cannot be called back by this."""


def write(ledger: Ledger, number: int, show_keys: bool = False) -> str:
    """The letter for one request; without names and ids of images unless `show_keys`. Raises LedgerError where there is
    no such request."""
    request = ledger.request(number)
    lines = [f"Your request no. {number} of {request.received[:10]}", ""]
    lines += [f"You asked that our models forget {_what(request, show_keys)}.", "", "What was done:"]
    for place, step in enumerate(ledger.history(number)):
        text, facts = DONE.get(step["event"]), step.get("evidence", {})
        if place and step["event"] == states.RECEIVED:
            text = BACK
        if step["event"] == states.RELEASED and facts.get("current") is False:
            text = NOT_CURRENT
        if text is None:
            continue
        lines.append(f"- {step['at'][:10]}: {text}")
        if step["event"] == states.REJECTED and (reason := step["private"].get("reason")):
            lines.append(f"  The reason: {reason}")
        if "images" in facts and step["event"] == states.RELEASED:
            lines.append(f"  images of yours that were found and are to be forgotten: {facts['images']}")
        if facts.get("missing"):
            lines.append(f"  Not all that you named was found: {facts['missing']} of it has no image in our data.")
        lines += [f"  {name}: {value}" for name, value in facts.items() if isinstance(value, str)]
    if request.is_open:
        lines += ["", (OVERDUE if request.is_overdue else OPEN).format(due=request.due)]
    if request.state not in (states.REJECTED, states.WITHDRAWN):
        lines += ["", CLAIMS]
    lines += ["", f"The record of your request bears the mark {request.commitment}."]
    return "\n".join(lines)


def _what(request: Request, show_keys: bool) -> str:
    if request.forget is None:
        return "what your request named, which has been erased from our records"
    ((kind, values),) = request.forget.items()
    what = ASKED.get(kind) or (
        "the image that you named" if len(values) == 1 else f"the {len(values)} images that you named"
    )
    return f"{what} ({', '.join(map(str, values))})" if show_keys else what
