"""report.html: one file with the verdict, the tables, the curves and the pictures of a run. It loads nothing from anywhere."""

import math
from pathlib import Path

from unlearn import config
from unlearn.data import selection
from unlearn.data.storage import Storage
from unlearn.models import base as models

NAME = "report.html"
POINTS = 300  # of a curve; more cannot be seen
CURVES = (
    ("retain", "Retain loss", ""), ("forget", "Forget loss", ""), ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", ""), ("images_per_s", "Throughput", "images/s"),
)  # fmt: skip
FIGURES = (("cosine", "Cosine", 3), ("psnr", "PSNR in the hole, dB", 1), ("fid", "FID", 1), ("is", "IS", 2))
# Where a figure should go from the original to the unlearned model. The oracle's value is the aim, not the extreme.
WANTED = {
    "forget": {"cosine": "lower", "psnr": "lower", "fid": "higher", "is": "lower"},
    "retain": {"cosine": "unchanged", "psnr": "unchanged", "fid": "unchanged", "is": "unchanged"},
}


def write(run: config.RunConfig, document: dict, show_forget: bool = False) -> str:
    """Write the report of a metrics.json into the run folder; returns its URI.

    Pictures are made anew from the data and the weights: those of the retain set always, those of the forget set only
    with `show_forget`. Ids are never shown.
    """
    import jinja2

    from unlearn.evaluation.pictures import Comparison
    from unlearn.training import metrics

    compared = Comparison(run)
    shown = [name for name in compared.sets if name == "retain" or show_forget]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    headline, sentences = verdict(document)
    html = environment.from_string(Path(__file__).with_name(NAME).read_text()).render(
        document=document,
        headline=headline,
        sentences=sentences,
        tracks=_tracks(document),
        facts=_facts(run, document),
        tables=[_table(document, name) for name in document["sets"]],
        curves=_curves(metrics.read(run.run_dir)),
        grids=[{"set": name, "rows": compared.grid_rows(name, run.evaluation.pictures)} for name in shown],
        withheld=[name for name in compared.sets if name not in shown],
    )
    storage = Storage(run.run_dir)
    storage.write(NAME, html.encode())
    return storage.where(NAME)


def table(document: dict):
    """A metrics.json as a rich Table for the terminal: figures with their differences to the original model's."""
    from rich.table import Table

    found = Table(title=f"feature network: {document['features']}", title_justify="left", box=None)
    tables = [_table(document, name) for name in document["sets"]]
    for head in ("set", "view", "model"):
        found.add_column(head)
    for head in tables[0]["heads"]:
        found.add_column(head["name"], justify="right")
    for part in tables:
        for row in part["rows"]:
            cells = [f"{cell['value']} {'(' + cell['change'] + ')' if cell['change'] else ''}".strip() for cell in row["cells"]]
            name, view = part["set"] if row is part["rows"][0] else "", row["view"] if row["first"] else ""
            found.add_row(name, view, row["generator"], *cells)
        found.add_section()
    found.caption, found.caption_justify = "\n".join(document["notes"]), "left"
    return found


def verdict(document: dict) -> tuple[str, list[str]]:
    """(headline, sentences) in plain words, from the figures under the first view.

    A change of the mean cosine counts where it is larger than twice its standard error, taken as for independent samples.
    """
    rows = {(row["generator"], row["set"]): row for row in document["rows"] if row["view"] == document["views"][0]}
    if "unlearned" not in document["generators"]:
        return "Nothing has been unlearned yet.", ["The figures are those of the model as it is."]
    if ("original", "forget") not in rows:
        told = "The run has no original model or no forget set: the figures stand for themselves."
        return "There is nothing to compare.", [told]
    forget, retain = _change(rows, "forget"), _change(rows, "retain")
    if not forget["fell"]:
        headline = "No forgetting can be seen."
    elif not retain["fell"]:
        headline = "The forget set is reconstructed worse than before, the retain set as well as before."
    elif forget["by"] > retain["by"]:
        headline = f"Forgotten at a price: the forget set lost {forget['by'] / retain['by']:.1f} times what the retain set lost."
    else:
        headline = "Not selective: the retain set lost at least as much as the forget set."
    sentences = [_told("forget", forget), _told("retain", retain)]
    if ("oracle", "forget") in rows:
        sentences.append(_against_oracle(rows))
    return headline, sentences


def _change(rows: dict, name: str) -> dict:
    before, after = rows["original", name], rows["unlearned", name]
    noise = math.hypot(before["cosine_std"] / before["images"] ** 0.5, after["cosine_std"] / after["images"] ** 0.5)
    by = before["cosine"] - after["cosine"]
    return {"before": before, "after": after, "by": by, "fell": by > 2 * noise}


def _told(name: str, change: dict) -> str:
    before, after = change["before"], change["after"]
    return (
        f"On the {name} set the hole is filled in with a similarity to the original image (cosine) of {after['cosine']:.3f}, "
        f"before {before['cosine']:.3f}, and a PSNR of {after['psnr']:.1f} dB, before {before['psnr']:.1f} dB."
    )


def _against_oracle(rows: dict) -> str:
    before, after, oracle = (rows[g, "forget"]["cosine"] for g in ("original", "unlearned", "oracle"))
    told = f"The oracle, a model trained without the forget set, has a cosine of {oracle:.3f} on it"
    if oracle >= before:
        return f"{told}: no lower than the original's, so it is no measure of forgetting here."
    share = (before - after) / (before - oracle)
    if share > 1:
        return f"{told}: the unlearned model has gone further. Worse than the oracle is no better: it can give the set away."
    return f"{told}: the unlearned model has come {max(share, 0):.0%} of the way to it."


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
    figures = [f for f in FIGURES if any(row[f[0]] is not None for row in document["rows"])]
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
        "heads": [{"name": title, "wanted": WANTED[name][key]} for key, title, _ in figures],
        "rows": rows,
    }


def _cell(row: dict, original: dict | None, key: str, digits: int) -> dict:
    value = row[key]
    if value is None:
        return {"value": "–", "change": None}
    if original is None or row is original or original[key] is None:
        return {"value": f"{value:.{digits}f}", "change": None}
    return {"value": f"{value:.{digits}f}", "change": f"{value - original[key]:+.{digits}f}".replace("-", "−")}


def _facts(run: config.RunConfig, document: dict) -> list[tuple[str, str]]:
    """What was run, as (name, value); counts and hashes, never an id."""
    from unlearn.training import metrics

    training, method, trained = run.training, run.method, metrics.read(run.run_dir)
    steps = f"{trained[-1]['step']:,} of {trained[-1]['steps']:,}" if trained else "none"
    engine = training.engine + (f", ZeRO stage {training.zero_stage}" if training.engine == "deepspeed" else "")
    region = method.noise_region or models.adapter(run.model.family).noise_region
    facts = [
        ("Method", f"{method.name}, alpha {method.alpha:g}, noise {method.noise} ({region}), distance {method.distance}"),
        ("Model", f"{run.model.family}, {run.model.variant or 'shape of its weights'}"),
        ("Training", f"{steps} steps of {training.batch_size} images, learning rate {training.lr:g}, {training.dtype}"),
        ("Training time", _time(document["training_seconds"])),
        ("Ran on", f"{run.cluster.workers} worker(s), {engine}"),
        ("Seed", str(run.seed)),
        ("Software", document["software"]),
        ("Configuration", f"sha256 {document['config_hash']}"),
    ]
    for name, found in selection.describe(selection.sets(run.data, run.seed)).items():
        facts.append((f"Trained on: {name}", f"{_count(found)}; data sha256 {found['manifest']}"))
    for name, found in document["sets"].items():
        facts.append((f"Measured on: {name}", f"{_count(found)} ({found['split']}); data sha256 {found['manifest']}"))
    return facts


def _count(found: dict) -> str:
    return f"{found['images']:,} images of {len(found['classes'])} class(es)"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
