"""history.html: requests, cycles, verdicts, figures and releases on one page. It loads nothing from anywhere, and names
no person and no image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from securesystemslib.signer import SSlibKey

from unlearn import __version__
from unlearn.cycles import history
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.history import Told
from unlearn.cycles.records import NEW, OLD, Records, now
from unlearn.data.storage import Storage
from unlearn.errors import UnlearnError
from unlearn.ledger import states
from unlearn.ledger.ledger import Ledger
from unlearn.ledger.request import Request
from unlearn.page import filled
from unlearn.releases import pointer, verification
from unlearn.releases.claims import NOT_CLAIMED
from unlearn.releases.store import Store

NAME = "history.html"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 44, 150, 14, 30  # of the drawing
# What is drawn: the set, what the line is called, its class in the page.
LINES = ((NEW, "new requests", "new"), (OLD, "old requests", "old"), ("retain", "retain set", "retain"))
TITLES = {"forget": "all requests", NEW: "new requests", OLD: "old requests", "retain": "retain set"}


def write(cycle: Cycle, output: str | None = None, key: SSlibKey | None = None) -> tuple[str, list[str]]:
    """Write the page to a file, by default to cycle_dir; (its URI, versions that do not verify). key: every release is
    verified with it, which reads its weights.

    Raises UnlearnError where the records, the ledger or the releases cannot be read.
    """
    records, store = Records(cycle.cycle_dir), Store(cycle.releases)
    every, state = history.of(records), pointer.read(store)
    with Ledger(cycle.ledger) as ledger:
        requests = ledger.requests()
    cycles = [_cycle(number, told, store, key) for number, told in enumerate(every, 1)]
    html = filled(
        Path(__file__).with_name("page.html"),
        name=cycle.name, headline=_headline(requests, state.version), sentences=_sentences(requests, every),
        drawing=_drawing(every),
        cycles=cycles,
        requests=_requests(requests, every),
        moves=state.history, not_claimed=NOT_CLAIMED, written=now()[:16].replace("T", " "),
        software=f"unlearn {__version__}",
        verified=key.keyid if key else None,
    )  # fmt: skip
    target = Storage(output) if output else Storage(records.storage.where(NAME))
    target.write("", html.encode())
    return target.uri, [each["release"] for each in cycles if each["wrong"]]


def _headline(requests: Sequence[Request], current: str | None) -> str:
    served = sum(r.state == states.RELEASED for r in requests)
    wanted = served + sum(r.is_open for r in requests)
    which = f"{current} is current" if current else "no release is current"
    return f"{served} of {wanted} request{'s' * (wanted != 1)} served; {which}."


def _sentences(requests: Sequence[Request], every: Sequence[Told]) -> list[str]:
    late, open_ = sum(r.is_overdue for r in requests), sum(r.is_open for r in requests)
    ended = sum(bool(told.ends) for told in every)
    under_way = f", {len(every) - ended} not to its end" if ended < len(every) else ""
    sentences = [
        f"{len(requests)} request{'s' * (len(requests) != 1)} came in, {open_} {'is' if open_ == 1 else 'are'} open, "
        f"{late} overdue. {len(every)} cycle{'s' * (len(every) != 1)} ran{under_way}."
    ]
    if every:
        sentences.append(
            "Every cycle starts from the base model and forgets all that was ever asked, so that no model is made "
            "from an unlearned one."
        )
    if every and every[-1].ends and every[-1].ends[-1].due:
        sentences.append("The last cycle released nothing: no model passed the gate, and retraining is due.")
    return sentences


def _requests(requests: Sequence[Request], every: Sequence[Told]) -> list[dict[str, Any]]:
    images = {asked.number: asked.images for told in every for asked in told.selection.new}
    return [
        {
            "number": r.id, "received": r.received[:10], "due": r.due,
            "state": r.state + (", overdue" if r.is_overdue else ""),
            "about": r.about(), "images": images.get(r.id), "release": r.evidence.get("release", ""),
            "commitment": r.commitment[:16],
        }
        for r in requests
    ]  # fmt: skip


def _cycle(number: int, told: Told, store: Store, key: SSlibKey | None) -> dict[str, Any]:
    s, last = told.selection, told.ends[-1] if told.ends else None
    release = last.release if last else None
    verified, wrong = _verified(store, release, key) if release and key else (None, False)
    rows = [
        {"title": TITLES[name], "before": told.figures[name].get("original", {}),
            "after": told.figures[name].get("unlearned", {})}
        for name in history.SETS if name in told.figures
    ]  # fmt: skip
    return {
        "number": number, "id": s.id, "began": s.at[:16].replace("T", " "), "ended": told.ended,
        "due": bool(last and last.due),
        "new": s.numbers, "images": sum(asked.images for asked in s.new), "old": [asked.number for asked in s.old],
        "unseen": [asked.number for asked in s.unseen], "unmatched": s.unmatched,
        "partly": [a.number for a in s.new if a.missing],
        "rungs": [
            {
                "number": j.rung, "passed": j.passed, "parent": j.parent or "no release", "gate": j.verdict is not None,
                "checks": [{"text": str(c), "passed": c.passed} for c in (j.verdict.checks if j.verdict else ())],
            }
            for j in told.tried
        ],
        "figures": rows, "rows": last.rows if last else None, "base": s.base[:16], "data": s.data[:16],
        "verified": verified, "wrong": wrong, "release": release,
    }  # fmt: skip


def _verified(store: Store, version: str, key: SSlibKey) -> tuple[str, bool]:
    """(what is found when a release is checked with the key, whether it is wrong)."""
    try:
        verification.verify(store.folder(store.release(version)).uri, key)
    except UnlearnError as e:
        return str(e), True
    return f"{version} is as it was signed with the key {key.keyid[:16]}", False


def _drawing(every: Sequence[Told]) -> dict[str, Any] | None:
    """Similarity (cosine) by cycle, as lines over cycles, the base's beside them; None where there is nothing to
    draw."""
    shown = [(number, told.figures) for number, told in enumerate(every, 1) if told.figures]
    values = [
        figures[name][which]["cosine"] for _, figures in shown for name, _, _ in LINES if name in figures
        for which in ("original", "unlearned") if "cosine" in figures[name].get(which, {})
    ]  # fmt: skip
    if not values:
        return None
    low, high = max(0.0, min(values) - 0.05), min(1.0, max(values) + 0.05)
    first, last = shown[0][0], shown[-1][0]

    def x(number: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((number - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    lines, labels = [], []
    for name, title, kind in LINES:
        for which, dashed in (("original", True), ("unlearned", False)):
            points = [
                (number, figures[name][which]["cosine"]) for number, figures in shown if "cosine" in figures.get(name,
                    {}).get(which, {})
            ]  # fmt: skip
            if not points:
                continue
            placed = [(round(x(n), 1), round(y(v), 1), f"cycle {n}, {title}: {v:.3f}") for n, v in points]
            lines.append(
                {"kind": kind, "dashed": dashed, "points": placed, "path": " ".join(f"{a},{b}" for a, b, _ in placed)}
            )
            if not dashed:
                labels.append([placed[-1][0], placed[-1][1], f"{title} {points[-1][1]:.3f}", kind])
    labels.sort(key=lambda label: label[1])
    for above, below in zip(labels, labels[1:], strict=False):  # one line of text each
        below[1] = max(below[1], above[1] + 15)
    ticks = [(round(y(v), 1), f"{v:.2f}") for v in (low, (low + high) / 2, high)]
    numbers = [(round(x(number), 1), f"cycle {number}") for number, _ in shown]
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM,
        "lines": lines, "labels": labels,
        "ticks": ticks, "cycles": numbers,
    }  # fmt: skip
