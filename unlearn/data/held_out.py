"""Which rows are measured: held-out images of the same classes, or the training images where there are none."""

from dataclasses import replace

import numpy as np

from unlearn import config
from unlearn.data import order, selection, shards
from unlearn.data.selection import RowSet


def sets(settings: config.RunConfig, trained: dict[str, RowSet]) -> dict[str, RowSet]:
    """{"forget": ..., "retain": ...} to measure on, each cut to evaluation.limit, drawn with the seed.

    trained: the training sets. Without evaluation.data they are measured (a proxy in the retain role). With it: the held-out
    rows of the same classes. What held-out shards cannot have is measured on the training images: a set chosen by ids or
    subjects, and a forget set that no class describes. Retain is by its classes, or every held-out row that is not forgotten.
    """
    manifest = shards.load(settings.evaluation.data) if settings.evaluation.data else None
    measured: dict[str, RowSet] = {}
    forget, retain = settings.data.forget, settings.data.retain or config.Rows()
    if forget is not None:
        by_class = forget.classes is not None or forget.exclude_classes is not None
        chosen = _same_classes(manifest, forget, settings.seed, "forget") if manifest and by_class else None
        measured["forget"] = chosen or trained["forget"]
    chosen = _same_classes(manifest, retain, settings.seed, "retain") if manifest else None
    if chosen and forget is not None and measured["forget"].manifest is manifest:
        keep = ~np.isin(chosen.rows, measured["forget"].rows)
        chosen = replace(chosen, rows=chosen.rows[keep], labels=chosen.labels[keep])
    measured["retain"] = chosen or trained["retain"]
    return {name: _limit(rows, settings.evaluation.limit, settings.seed) for name, rows in measured.items()}


def _same_classes(manifest: shards.Manifest, rows: config.Rows, seed: int, what: str) -> RowSet | None:
    """The held-out rows of the same classes; None where the rows were named one by one."""
    if rows.ids is not None or rows.subjects is not None:
        return None
    return selection.select(manifest, config.Rows(classes=rows.classes, exclude_classes=rows.exclude_classes), seed, what)


def _limit(rows: RowSet, limit: int | None, seed: int) -> RowSet:
    if limit is None or len(rows) <= limit:
        return rows
    kept = np.sort(order.generator(seed, 1 << 21).permutation(len(rows))[:limit])
    return replace(rows, rows=rows.rows[kept], labels=rows.labels[kept])
