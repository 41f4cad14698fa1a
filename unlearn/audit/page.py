"""audit.html: one file with the verdict, its reasons and the figures of every test. It loads nothing and holds no
image."""

import math
from pathlib import Path
from typing import Any

from unlearn.data.storage import Storage
from unlearn.evaluation.oracles import shown
from unlearn.page import filled
from unlearn.run import Run

NAME = "audit.html"


def write(run: Run, document: dict[str, Any]) -> str:
    """Write the page of an audit.json into the run folder; its URI."""
    html = filled(
        Path(__file__).with_name("page.html"),
        document=document, tests=[_test(document, name) for name in document["tests"]], generators=_columns(document),
        run=run.folder,
    )  # fmt: skip
    storage = Storage(run.folder)
    storage.write(NAME, html.encode())
    return storage.where(NAME)


def table(document: dict[str, Any]):
    """An audit.json as a rich Table for the terminal."""
    from rich.table import Table

    generators = _columns(document)
    rich_table = Table(title=f"audit: {document['verdict']}", title_justify="left", box=None)
    for head in ("test", "verdict", "figure"):
        rich_table.add_column(head)
    for generator in generators:
        rich_table.add_column(generator, justify="right")
    for name in document["tests"]:
        test = _test(document, name)
        for i, row in enumerate(test["rows"] or [{"title": "", "cells": [""] * len(generators)}]):
            first = (name, test["verdict"]) if i == 0 else ("", "")
            rich_table.add_row(*first, row["title"], *(cell.partition(" [")[0] for cell in row["cells"]))
        rich_table.add_section()
    rich_table.caption = "\n".join(r for name in document["tests"] for r in document[name]["reasons"])
    rich_table.caption_justify = "left"
    return rich_table


def _test(document: dict[str, Any], name: str) -> dict[str, Any]:
    """One test for the page: its figures as rows, a cell a generator."""
    test = document[name]
    rows = [
        {
            "title": about["title"], "judged": about["judged"], "note": about["note"],
            "cells": [_cell(test.get(generator, {}), figure, about["digits"]) for generator in _columns(document)],
        }
        for figure, about in test["figures"].items()
    ]  # fmt: skip
    curves = [_curve(test["figures"][figure]["title"], lines) for figure, lines in test.get("curves", {}).items()]
    return test | {"name": name, "rows": rows, "drawn": curves}


def _curve(title: str, lines: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Lines in a box of 100 x 100, y upwards; the points of x at even distances, as they were chosen."""
    xs = [x for x, _ in next(iter(lines.values()))]
    values = [y for line in lines.values() for _, y in line]
    low, high = math.floor(min(values)), math.ceil(max(values) + 1e-9)
    high = max(high, low + 1)

    def at(place: int, y: float) -> str:
        return f"{100 * place / max(len(xs) - 1, 1):.2f},{100 - 100 * (y - low) / (high - low):.2f}"

    return {
        "title": title.partition(":")[0], "low": low, "high": high,
        "marks": [{"at": 100 * i / max(len(xs) - 1, 1), "text": f"{x:g}"} for i, x in enumerate(xs)],
        "lines": [
            {"generator": g, "points": " ".join(at(i, y) for i, (_, y) in enumerate(line)),
                "last": f"{line[-1][1]:.1f}", "first": f"{line[0][1]:.1f}"}
            for g, line in lines.items()
        ],
    }  # fmt: skip


def _columns(document: dict[str, Any]) -> list[str]:
    """The generators that have a column; of several oracles there is one, their mean."""
    return shown(document["weights"])


def _cell(row: dict[str, float], figure: str, digits: int) -> str:
    if figure not in row:
        return "–"
    told = f"{row[figure]:.{digits}f}"
    if f"{figure}_low" in row:
        told += f" [{row[f'{figure}_low']:.{digits}f}, {row[f'{figure}_high']:.{digits}f}]"
    return told.replace("-", "−")
