"""Which requests a cycle serves, and how they move through the ledger's states."""

import logging
from collections.abc import Sequence
from typing import Any

from unlearn.config import Rows
from unlearn.cycles.cycle import Cycle, digest
from unlearn.cycles.records import GIVEN_UP, SELECTION, Asked, Outcome, Records, Selection, now
from unlearn.data import shards
from unlearn.data.manifest import Manifest
from unlearn.errors import CycleError
from unlearn.ledger import selection as rows
from unlearn.ledger import states
from unlearn.ledger.ledger import Ledger
from unlearn.ledger.request import Request
from unlearn.registry import METHODS
from unlearn.releases import pointer
from unlearn.releases.store import Store

log = logging.getLogger(__name__)

BY = "unlearn cycle"


def select(cycle: Cycle, ledger: Ledger) -> Selection:
    """The cycle that was begun and has not ended, else a new one; see `jobs.cycle.select`."""
    requests = ledger.requests((*states.OPEN, states.RELEASED))
    if not any(request.is_open for request in requests):
        return Selection(status="nothing")
    records, manifest = Records(cycle.cycle_dir), data(cycle)
    from unlearn.models import weights  # torch is loaded where there is something to do

    base = weights.locate(cycle.base)
    _check_base(cycle.base, base.card)
    if begun := _begun(ledger, records, requests, base.fingerprint, manifest.hash):
        _check_promotable(cycle, begun)
        return begun
    chosen = rows.resolve(requests, manifest)
    met = {request.id: chosen.matched.get(request.id, 0) for request in requests}
    new = [_asked(r, chosen) for r in requests if r.is_open and met[r.id]]
    unmatched = [r.id for r in requests if r.is_open and not met[r.id]]
    if not new:
        return Selection(status="nothing", unmatched=unmatched)
    served = [r for r in requests if not r.is_open]
    _check_erased(served, ledger)
    _check_known(served, chosen, records, base.card, manifest)
    old, unseen = ([_asked(r, chosen) for r in served if bool(met[r.id]) is there] for there in (True, False))
    selection = Selection(
        status="selected", id="", at=now(), new=new, old=old, unseen=unseen, unmatched=unmatched, base=base.fingerprint,
        data=manifest.hash
    )  # fmt: skip
    selection = selection.model_copy(update={"id": identity(selection)})
    if records.read(selection.id, given_up(cycle, records, selection.id), Outcome):
        return selection.model_copy(update={"status": "due"})
    _check_promotable(cycle, selection)
    before = list(records.all())
    selection = records.keep(selection.id, SELECTION, selection)
    if before and before[-1].base != selection.base:
        log.warning(
            "%s is another base (%s) than that of cycle %s (%s)", cycle.base, selection.base[:16], before[-1].id,
            before[-1].base[:16],
        )  # fmt: skip
    advance(ledger, selection, states.SCHEDULED)
    return selection


def data(cycle: Cycle) -> Manifest:
    """The manifest of the training data. Raises DataError."""
    settings = cycle.settings(0)
    return shards.load(settings.data.train, settings.data.split)


def identity(selection: Selection) -> str:
    """The id of a cycle: of its requests, its base and its data alone, so that it is the same however often it is
    started."""
    asked = {name: [[a.number, a.commitment] for a in getattr(selection, name)] for name in ("new", "old", "unseen")}
    return digest(asked | {"base": selection.base, "data": selection.data})


def given_up(cycle: Cycle, records: Records, id: str) -> str:
    """The name of the record that says that a cycle was given up under these settings, beside this parent."""
    return f"{GIVEN_UP}/{cycle.identity()}-{parent(cycle, records, id) or 'none'}.json"


def parent(cycle: Cycle, records: Records, id: str) -> str | None:
    """The release that a cycle follows: the current one, or, where that came of this very cycle, the one before."""
    store = Store(cycle.releases)
    if (current := pointer.read(store).version) is None:
        return None
    release = store.release(current)
    own = {judgement.weights for judgement in records.judgements(id) if judgement.passed}
    return (release.parent and release.parent.version) if release.weights in own else current


def named(ledger: Ledger, asked: Sequence[Asked], manifest: Manifest) -> Rows | None:
    """The rows that requests name together, as `data.forget` takes them. Raises CycleError where one cannot be resolved
    any more."""
    if not asked:
        return None
    chosen = rows.resolve(ledger.requests(ids=[each.number for each in asked]), manifest)
    if lost := sorted(each.number for each in asked if chosen.matched.get(each.number, 0) != each.images):
        raise CycleError(
            f"request(s) {', '.join(map(str, lost))}: they do not meet the images any more that they met when the "
            "cycle began: what they name was erased, or the data was changed meanwhile"
        )
    return chosen.forget


def advance(ledger: Ledger, selection: Selection, state: str, evidence: dict[str, Any] | None = None) -> None:
    """Move the requests of a cycle on to `state`, those that are in the state before; who has withdrawn meanwhile is
    left alone. The last state tells how many images each has met, and how many of the values that it names none."""
    before = states.OPEN[states.OPEN.index(state) - 1] if state in states.OPEN else states.VERIFIED
    requests = ledger.requests(ids=selection.numbers)
    ready = [
        r.id for r in requests
        if r.state == before and (before == states.RECEIVED or r.evidence.get("cycle") == selection.id)
    ]  # fmt: skip
    met = {asked.number: {"images": asked.images, "missing": asked.missing} for asked in selection.new}
    own = met if state == states.RELEASED else None
    ledger.advance(ready, state, {"cycle": selection.id} | (evidence or {}), by=BY, own=own)


def hand_back(ledger: Ledger, id: str, why: str) -> list[int]:
    """Requests of a cycle that ends without a release become `received` again; their numbers."""
    under_way = [state for state in states.OPEN if state != states.RECEIVED]
    numbers = [r.id for r in ledger.requests(under_way) if r.evidence.get("cycle") == id]
    return ledger.advance(numbers, states.RECEIVED, {"cycle": id, "ended": why}, by=BY)


def _begun(
    ledger: Ledger, records: Records, requests: Sequence[Request], base: str, data: str
) -> Selection | None:  # fmt: skip
    """The cycle that open requests are in, if it can go on as it was begun; those of any other are handed back."""
    under_way = [r for r in requests if r.is_open and r.state != states.RECEIVED]
    served = {r.id for r in requests if not r.is_open}
    erased = {r.id for r in requests if r.forget is None}
    for id in sorted({str(r.evidence.get("cycle")) for r in under_way}):
        selection = records.read(id, SELECTION, Selection)
        if selection is None:
            why = f"{records.storage.uri} has no such cycle"
        elif (selection.base, selection.data) != (base, data):
            why = "the base or the data was changed"
        elif served - {asked.number for asked in (*selection.new, *selection.old, *selection.unseen)}:
            why = "others were served meanwhile"
        elif erased & {asked.number for asked in selection.old}:
            why = "requests that it serves again were erased"
        else:
            return selection
        numbers = hand_back(ledger, id, why)
        log.warning("cycle %s does not go on, %s: its %d request(s) are selected anew", id, why, len(numbers))
    return None


def _asked(request: Request, chosen: rows.Selection) -> Asked:
    missing, images = len(chosen.missing.get(request.id, ())), chosen.matched.get(request.id, 0)
    return Asked(number=request.id, commitment=request.commitment, images=images, missing=missing)


def _check_base(uri: str, card: dict[str, Any]) -> None:
    """Raises CycleError where the base was unlearned: chains of unlearning ruin a model."""
    if (method := card.get("method")) and METHODS.load(method).needs_forget:
        raise CycleError(
            f"{uri}: its model.json says that it was unlearned (method {method}): a cycle starts from a base that was "
            "not, and forgets from there all that was ever asked. Give model.weights the original model"
        )


def _check_promotable(cycle: Cycle, selection: Selection) -> None:
    """Raises CycleError where the release of this cycle could not become current, before anything is trained for it."""
    store = Store(cycle.releases)
    state = pointer.read(store)
    serves = [asked.commitment for asked in (*selection.new, *selection.old, *selection.unseen)]
    lost = pointer.remembered(store.releases(), state, serves)
    if not cycle.promote or not lost:
        return
    versions = sorted({version for those in lost.values() for version in those})
    never = [version for version in versions if version not in state.served]
    way = (
        "; ".join(
            f"`unlearn release withdraw {version} --store {store.storage.uri} --reason TEXT`" for version in never
        )
        if never == versions
        else "promote=false, and then `unlearn release promote` with --force and --reason"
    )
    raise CycleError(
        f"{', '.join(versions)} in {store.storage.uri} serves {len(lost)} request(s) that the ledger does not have as "
        f"released, {', '.join(request[:16] for request in sorted(lost)[:5])}: what this cycle releases could not "
        f"become current after it. Where that is a mistake: {way}"
    )


def _check_erased(served: Sequence[Request], ledger: Ledger) -> None:
    """Raises CycleError where images of an erased request may be in the data: nobody knows which they are, so they
    would be retained."""
    erased = {r.id for r in served if r.forget is None}
    if lost := sorted(erased - ledger.gone() if erased else erased):
        numbers = " ".join(map(str, lost))
        raise CycleError(
            f"request(s) {numbers} were served and then erased: nobody knows which images they name, and what of them "
            "is in the training data would be trained on again. Where the images have left the data say so: `unlearn "
            f"request erase {numbers} --retention 0d --images-gone`; else take them out first (the config.yaml in the "
            "run folders of earlier cycles may still name them), and give a base that was trained on the rest"
        )


def _check_known(
    served: Sequence[Request], chosen: rows.Selection, records: Records, card: dict[str, Any], manifest: Manifest
) -> None:
    """Raises CycleError where the base may remember images that cannot be shown to it any more."""
    trained_on = card.get("data")
    if isinstance(trained_on, dict) and set(trained_on.values()) == {manifest.hash}:
        return  # the base was trained on what is there now, from nothing: it has never seen what is not
    cycles = {str(request.evidence.get("cycle")) for request in served}
    before = [found for id in sorted(cycles) if (found := records.read(id, SELECTION, Selection))]
    images = {asked.number: asked.images for selection in before for asked in selection.new}
    lost = [r.id for r in served if chosen.matched.get(r.id, 0) < images.get(r.id, 1)]
    if lost:
        raise CycleError(
            f"request(s) {', '.join(map(str, lost))} were served, and images of theirs are not in {manifest.uri} any "
            "more; the base was trained on other data, may remember them, and can only be made to forget what it "
            "can be shown. Give the shards from before (data.train), or a base that was trained on these"
        )
