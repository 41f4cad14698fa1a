"""audit.html: one file with the verdict, its reasons and the figures of every test. It loads nothing and holds no image."""

from pathlib import Path
from typing import Any

from unlearn.data.storage import Storage
from unlearn.evaluation.oracles import shown
from unlearn.run import Run

NAME = "audit.html"


def write(run: Run, document: dict[str, Any]) -> str:
    """Write the page of an audit.json into the run folder; its URI."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(Path(__file__).with_name("page.html").read_text()).render(
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
    return test | {"name": name, "rows": rows}


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
