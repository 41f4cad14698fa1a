"""The leaderboard for people: a table for the terminal, and report.html, which loads nothing from anywhere."""

import itertools
import math
from pathlib import Path
from typing import Any

from unlearn.page import filled
from unlearn.search import labels

NAME = "report.html"
WIDTH, HEIGHT = 560, 330  # of the drawing's plane, in its own units
# (figure, head, how it is written, what a reader should want)
COLUMNS = (
    ("distance", "distance to the oracle", "{:.1f}", "lower"),
    ("audit.passed", "audit", "{:.0%}", "runs that PASS"),
    ("forget.distance", "on forget", "{:.1f}", "lower"),
    ("retain.distance", "on retain", "{:.1f}", "lower"),
    ("forget.cosine", "forget cosine", "{:.3f}", "as the oracle's"),
    ("retain.cosine", "retain cosine", "{:.3f}", "as the oracle's"),
    ("forget.psnr", "forget PSNR, dB", "{:.1f}", "as the oracle's"),
    ("retain.psnr", "retain PSNR, dB", "{:.1f}", "as the oracle's"),
    ("cost.flops", "FLOPs", "{:.2g}", ""),
    ("cost.seconds", "seconds", "{:.0f}", ""),
)


def columns(document: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The columns that a row has a figure for. Distances in cosine are written finely; without an oracle nothing is
    wanted of what would be compared with it."""
    known = {figure for row in document["rows"] for figure in row["figures"]}
    fine = document["distance"] == "cosine"
    if any(row["audits"]["verdicts"] or row["audits"]["broken"] for row in document["rows"]):
        known.add("audit.passed")
    return [
        (
            figure,
            head,
            "{:.3f}" if fine and figure.endswith("distance") else form,
            wanted if document["distance"] else "",
        )
        for figure, head, form, wanted in COLUMNS
        if figure in known
    ]


def cell(row: dict[str, Any], figure: str, form: str) -> str:
    """A figure with its spread."""
    if figure == "audit.passed":
        return _audits(row["audits"]) or "–"
    known = row["figures"].get(figure)
    if known is None:
        return "–"
    spread = "" if known["spread"] is None or figure == "cost.flops" else f" ± {form.format(known['spread'])}"
    return form.format(known["mean"]) + spread


def _audits(audits: dict[str, Any]) -> str:
    """Verdicts with the number of runs that have them, as in FAIL 2 (transfer 1, relearning 2), PASS 1."""
    failed = ", ".join(f"{test} {count}" for test, count in audits["failed"].items())
    told = {verdict: f"{verdict} {count}" for verdict, count in sorted(audits["verdicts"].items())}
    if failed and "FAIL" in told:
        told["FAIL"] += f" ({failed})"
    return ", ".join([*told.values(), *([f"not audited {audits['broken']}"] if audits["broken"] else [])])


def table(document: dict[str, Any], width: int):
    """As a rich Table, of the columns for which a terminal of that width has room."""
    from rich.table import Table

    made = Table(title=title(document), title_justify="left", box=None)
    made.add_column("method", overflow="fold")
    heads = columns(document)
    room = itertools.accumulate((22 if figure == "audit.passed" else 12 for figure, *_ in heads), initial=22)
    seen = max(sum(taken <= width for taken in room) - 1, 1)
    notes = [*document["notes"], *(["The page has more columns."] if seen < len(heads) else [])]
    heads = heads[:seen]
    for _, head, _, _ in heads:
        made.add_column(head, justify="right")
    for row in document["rows"]:
        done = "" if row["done"] == row["of"] else f" ({row['done']} of {row['of']})"
        made.add_row(row["method"] + done, *(cell(row, figure, form) for figure, _, form, _ in heads))
    made.add_section()
    for name, figures in document["reference"].items():
        if figures:
            made.add_row(f"({name})", *(form.format(figures[f]) if f in figures else "" for f, _, form, _ in heads))
    made.caption, made.caption_justify = "\n".join(notes), "left"
    return made


def title(document: dict[str, Any]) -> str:
    """What was compared, in a line."""
    seeds, originals, oracles = len(document["seeds"]), document["originals"], max(document["oracles"])
    counts = [(seeds, "seed"), (originals, "original"), (oracles, "oracle")]
    told = ", ".join(f"{n or 'no'} {what}{'' if n == 1 else 's'}" for n, what in counts)
    return f"{document['name']}: {told}; {document['view']} hidden; mean ± standard deviation"


def html(document: dict[str, Any]) -> str:
    """The page."""
    heads = columns(document)
    rows = [
        {
            "method": row["method"], "options": _plain(row["options"]), "done": row["done"], "of": row["of"],
            "failed": row["failed"],
            "cells": [cell(row, figure, form) for figure, _, form, _ in heads],
        }
        for row in document["rows"]
    ]  # fmt: skip
    reference = [
        {"name": name, "cells": [form.format(figures[f]) if f in figures else "" for f, _, form, _ in heads]}
        for name, figures in document["reference"].items()
        if figures
    ]
    return filled(
        Path(__file__).with_name("leaderboard.html"),
        document=document,
        told=title(document),
        heads=heads,
        rows=rows,
        reference=reference,
        drawing=drawing(document),
    )


def drawing(document: dict[str, Any]) -> dict[str, Any] | None:
    """Marks, labels and ticks of a plane of WIDTH x HEIGHT: to the right the forget set's distance to the oracle, or
    its cosine where there is no oracle; upwards the cosine of the retain set.

    None where nothing has come to an end.
    """
    figure = "forget.distance" if document["distance"] else "forget.cosine"
    points = [
        (row["method"], row["figures"][figure], row["figures"]["retain.cosine"])
        for row in document["rows"]
        if figure in row["figures"]
    ]
    if not points:
        return None
    least = 0.0 if document["distance"] else min(x["mean"] - (x["spread"] or 0) for _, x, _ in points)
    most = [x["mean"] + (x["spread"] or 0) for _, x, _ in points]
    before = [] if document["distance"] else [f[figure] for f in document["reference"].values() if figure in f]
    right = _ticks(least, max(most + before))
    known = [y["mean"] for _, _, y in points] + [
        f["retain.cosine"] for f in document["reference"].values() if "retain.cosine" in f
    ]
    spreads = [y["spread"] or 0 for _, _, y in points]
    up = _ticks(min(known) - max(spreads), max(known) + max(spreads))

    def across(value: float) -> float:
        return WIDTH * (value - right[0]) / (right[-1] - right[0])

    def above(value: float) -> float:
        return HEIGHT - HEIGHT * (value - up[0]) / (up[-1] - up[0])

    marks = [
        {
            "label": label, "x": across(x["mean"]), "y": above(y["mean"]),
            "left": across(max(x["mean"] - (x["spread"] or 0), right[0])),
            "right": across(x["mean"] + (x["spread"] or 0)),
            "low": above(y["mean"] - (y["spread"] or 0)), "high": above(y["mean"] + (y["spread"] or 0)),
        }
        for label, x, y in points
    ]  # fmt: skip
    references = [
        {
            "name": name, "y": above(figures["retain.cosine"]), "rise": -4.0,
            "x": across(figures[figure]) if before and figure in figures else None,
        }
        for name, figures in document["reference"].items() if "retain.cosine" in figures
    ]  # fmt: skip
    # A name stands above its line, but the lower of two that would meet below it.
    for high, low in itertools.pairwise(sorted(references, key=lambda r: r["y"])):
        if low["y"] - high["y"] < labels.HEIGHT:
            low["rise"] = labels.HEIGHT
    names = [labels.Label(r["name"], WIDTH, r["y"] + r["rise"], "end").box for r in references]
    numbers = [(str(number), mark["x"], mark["y"]) for number, mark in enumerate(marks, 1)]
    return {
        "width": WIDTH, "height": HEIGHT, "marks": marks, "labels": labels.placed(numbers, names, WIDTH, HEIGHT),
        "across": [{"at": across(t), "text": f"{t:g}"} for t in right],
        "above": [{"at": above(t), "text": f"{t:.4g}"} for t in up],
        "references": references,
    }  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in equal steps from at most `low` to at least `high`."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * s for s in (0.1, 0.2, 0.5, 1, 2) if span / (power * s) <= 6)
    first = math.floor(low / step + 1e-9)
    return [round(step * i, 10) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _plain(options: dict[str, Any]) -> str:
    """The settings of a method in a line."""
    method = {f"method.{key}": value for key, value in options["method"].items() if key != "name"}
    rest = {key: value for key, value in options.items() if key != "method"}
    return ", ".join([options["method"]["name"], *(f"{key} {value}" for key, value in (method | rest).items())])
