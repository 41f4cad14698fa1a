"""report.html: one file with the verdict, the tables, the curves and the pictures of a run. It loads nothing from
anywhere."""

import base64
import io
import math
from pathlib import Path

import torch
from PIL import Image

from unlearn.data import selection
from unlearn.data.storage import Storage
from unlearn.evaluation import story
from unlearn.evaluation.verdict import verdict
from unlearn.page import filled
from unlearn.run import Run
from unlearn.training import metrics

NAME = "report.html"
POINTS = 300  # of a curve; more cannot be seen
CURVES = (
    ("retain", "Retain loss", ""), ("forget", "Forget loss", ""), ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", ""), ("images_per_s", "Throughput", "images/s"),
)  # fmt: skip
FIGURES = (
    ("cosine", "Cosine", 3), ("psnr", "PSNR in the hole, dB", 1), ("ssim", "SSIM in the hole", 3),
    ("lpips", "LPIPS", 3), ("fid", "FID", 1), ("kid", "KID", 3), ("is", "IS", 2),
)  # fmt: skip
# Where a figure should go from the original to the unlearned model. The oracle's value is the aim, not the extreme.
WANTED = {
    "forget": dict.fromkeys(("cosine", "psnr", "ssim", "is"), "lower")
    | dict.fromkeys(("lpips", "fid", "kid"), "higher"),
    "retain": dict.fromkeys((figure for figure, _, _ in FIGURES), "unchanged"),
}


def write(run: Run, document: dict, grids: list[dict]) -> str:
    """Write the report of a metrics.json into the run folder; returns its URI.

    grids: the picture grids to show, as unlearn.evaluation.measure makes them. Ids are never shown.
    """
    headline, sentences = verdict(document)
    shown = [grid["set"] for grid in grids]
    html = filled(
        Path(__file__).with_name(NAME),
        document=document,
        asked=story.asked(run),
        done=story.done(run, document),
        audit=story.audit(run, document),
        commands=story.commands(run),
        not_claimed=story.NOT_CLAIMED,
        private=run.settings.names_rows,
        network=network(document),
        headline=headline,
        sentences=sentences,
        tracks=_tracks(document),
        facts=_facts(run, document),
        tables=[_table(document, name) for name in document["sets"]],
        curves=_curves(metrics.read(run.folder)),
        grids=[{"set": grid["set"], "rows": _picture_rows(grid)} for grid in grids],
        withheld=[name for name in document["sets"] if name not in shown],
    )
    storage = Storage(run.folder)
    storage.write(NAME, html.encode())
    return storage.where(NAME)


def _picture_rows(grid: dict) -> list[dict]:
    """[{"label": class, "cells": [(column, data URI), ...]}], a row an image."""
    return [
        {"label": label, "cells": [(title, data_uri(images[row])) for title, images in grid["columns"]]}
        for row, label in enumerate(grid["labels"])
    ]


def data_uri(image: torch.Tensor) -> str:
    """A uint8 image (3, S, S) as a data URI: PNG where it is small, JPEG where that would be heavy."""
    kind = "png" if image.shape[-1] <= 128 else "jpeg"
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, kind, quality=92)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def table(document: dict):
    """A metrics.json as a rich Table for the terminal: figures with their differences to the original model's. Six
    figures fit into 80 columns."""
    from rich.table import Table

    title = f"feature network: {network(document)}; + and −: difference to the original"
    rich_table = Table(title=title, title_justify="left", box=None)
    tables = [_table(document, name) for name in document["sets"]]
    for head in ("set", "view", "model"):
        rich_table.add_column(head, no_wrap=head == "model")
    for head in tables[0]["heads"]:
        rich_table.add_column(head["name"], justify="right")
    for part in tables:
        for row in part["rows"]:
            cells = [f"{cell['value']} {cell['change'] or ''}".strip() for cell in row["cells"]]
            name, view = part["set"] if row is part["rows"][0] else "", row["view"] if row["first"] else ""
            rich_table.add_row(name, view, row["generator"], *cells)
        rich_table.add_section()
    rich_table.caption, rich_table.caption_justify = "\n".join(document["notes"]), "left"
    return rich_table


def network(document: dict) -> str:
    """What looked at the images, and how they got to its size, where the document says it."""
    return document["features"] + (f", resize {document['resize']}" if "resize" in document else "")


def _tracks(document: dict) -> list[dict]:
    """Cosine of each set and generator under the first view, as positions on a line from 0 (or the lowest) to 1."""
    rows = [row for row in document["rows"] if row["view"] == document["views"][0]]
    low = min([0.0, *(row["cosine"] for row in rows)])
    return [
        {
            "set": name,
            "marks": [
                {"generator": r["generator"], "value": r["cosine"], "at": 100 * (r["cosine"] - low) / (1 - low)}
                for r in rows if r["set"] == name
            ],
        }
        for name in document["sets"]
    ]  # fmt: skip


def _table(document: dict, name: str) -> dict:
    """Head and rows of one set: each figure with its difference to the original's."""
    figures = [f for f in FIGURES if any(row.get(f[0]) is not None for row in document["rows"])]
    rows = []
    for view in document["views"]:
        block = [row for row in document["rows"] if row["set"] == name and row["view"] == view]
        original = next((row for row in block if row["generator"] == "original"), None)
        for row in block:
            cells = [_cell(row, original, key, digits) for key, _, digits in figures]
            place = {"view": view, "first": row is block[0], "span": len(block)}
            rows.append(place | {"generator": row["generator"], "cells": cells})
    return {
        "set": name,
        "about": document["sets"][name],
        "heads": [{"name": title, "wanted": WANTED[name.partition("_")[0]][key]} for key, title, _ in figures],
        "rows": rows,
    }


def _cell(row: dict, original: dict | None, key: str, digits: int) -> dict:
    value, low = row.get(key), row.get(f"{key}_low")  # metrics.json of earlier versions has fewer figures
    interval = None if low is None else f"{low:.{digits}f} – {row[f'{key}_high']:.{digits}f}".replace("-", "−")
    if value is None:
        return {"value": "–", "change": None, "interval": None}
    change = None
    if original is not None and row is not original and original.get(key) is not None:
        change = f"{value - original[key]:+.{digits}f}".replace("-", "−")
    return {"value": f"{value:.{digits}f}".replace("-", "−"), "change": change, "interval": interval}


def _facts(run: Run, document: dict) -> list[tuple[str, str]]:
    """What was run, as (name, value); counts and hashes, never an id."""
    settings, trained = run.settings, metrics.read(run.folder)
    training = settings.training
    steps = f"{trained[-1]['step']:,} of {trained[-1]['steps']:,}" if trained else "none"
    engine = training.engine + (f", ZeRO stage {training.zero_stage}" if training.engine == "deepspeed" else "")
    options = settings.method.model_dump(mode="json", exclude={"name"})
    facts = [
        ("Method", ", ".join([settings.method.name, *(f"{key} {_plain(value)}" for key, value in options.items())])),
        ("Model", f"{settings.model.family}, {settings.model.variant or 'shape of its weights'}"),
        ("Training", f"{steps} steps of {training.batch_size} images, learning rate {training.lr:g}, {training.dtype}"),
        ("Training time", _time(document["training_seconds"])),
        ("Ran on", f"{settings.cluster.workers} worker(s), {engine}"),
        ("Seed", str(settings.seed)),
        ("Software", document["software"]),
        ("Configuration", f"sha256 {document['config_hash']}"),
    ]
    facts += [(f"Weights: {name}", f"sha256 {digest}") for name, digest in document["weights"].items()]
    facts += [(f"Network: {name}", f"sha256 {digest}") for name, digest in document.get("networks", {}).items()]
    for name, described in selection.describe(run.sets).items():
        facts.append((f"Trained on: {name}", f"{_count(described)}; data sha256 {described['manifest']}"))
    for name, described in document["sets"].items():
        facts.append(
            (f"Measured on: {name}", f"{_count(described)} ({described['split']}); data sha256 {described['manifest']}")
        )
    return facts


def _plain(value: object) -> str:
    return "by default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _count(described: dict) -> str:
    return f"{described['images']:,} images of {len(described['classes'])} class(es)"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _curves(rows: list[dict]) -> list[dict]:
    """Lines of the training's figures in a box of 100 x 100, y upwards from 0."""
    curves = []
    for key, title, unit in CURVES:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if len(points) < 2:
            continue
        points = points[:: max(1, len(points) // POINTS)] + points[-1:]
        last, ticks = points[-1][0], _ticks(max(y for _, y in points))
        top = ticks[-1]
        curves.append({
            "title": title, "unit": unit, "last": f"{last:,}",
            "line": " ".join(f"{100 * x / last:.2f},{100 - 100 * y / top:.2f}" for x, y in points),
            "ticks": [{"at": 100 - 100 * t / top, "text": f"{t:.3g}"} for t in ticks],
            "summary": f"from {points[0][1]:.3g} at step {points[0][0]:,} to {points[-1][1]:.3g} at step {last:,}",
        })  # fmt: skip
    return curves


def _ticks(high: float) -> list[float]:
    """0 to at least `high` in two to five round steps."""
    if high <= 0:
        return [0.0, 1.0]
    power = 10 ** math.floor(math.log10(high))
    step = next(power * s for s in (0.2, 0.5, 1, 2, 5) if power * s * 5 >= high)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]
