"""The rows to measure on: held-out images of the same classes, or the training images where there are none."""

from dataclasses import replace

import numpy as np

from unlearn import config
from unlearn.data import classes, order, selection, shards
from unlearn.data.selection import RowSet
from unlearn.errors import ConfigError


def sets(settings: config.RunConfig, trained: dict[str, RowSet]) -> dict[str, RowSet]:
    """{"forget": ..., "retain": ...} to measure on, each cut to evaluation.limit, drawn with the seed.

    trained: the training sets. Without evaluation.data and evaluation.split they are measured (a proxy in the retain
    role). With one of them: the held-out rows of the same classes, which are matched by name wherever there are names.
    Sets that held-out shards cannot have are measured on the training images: sets chosen by ids or subjects, and a
    forget set that is not chosen by class. Retain is chosen by its classes, or is every held-out row that is not in the
    forget set.
    """
    manifest = _manifest(settings)
    # Classes in the configuration refer to data.train; a retain set may come from data.proxy_data.
    train = trained["forget"].manifest if "forget" in trained else shards.load(settings.data.train, settings.data.split)
    measured: dict[str, RowSet] = {}
    if settings.data.forget is not None:
        chosen = _forgotten(settings, manifest, train) if manifest else None
        measured["forget"] = chosen or trained["forget"]
    chosen = _retained(settings, manifest, train) if manifest else None
    measured["retain"] = chosen or trained["retain"]
    return {name: _limit(rows, settings.evaluation.limit, settings.seed) for name, rows in measured.items()}


def of_classes(settings: config.RunConfig, trained: dict[str, RowSet]) -> dict[str, RowSet]:
    """{"forget": ..., "retain": ...}: the held-out rows of the classes that the training sets have, however these were
    chosen.

    Of a set without labels, every held-out row. A set has none where evaluation.data names no other images than those
    of training. Where a proxy stands for the retain set, these are of the classes that it stands for.
    """
    manifest, found = _manifest(settings), {}
    for name, rows in trained.items():
        if manifest is None or manifest.hash == rows.manifest.hash:
            continue
        if name == "retain" and settings.data.proxy is not None:  # its classes are others
            if "forget" in trained and (stood_for := _retained(settings, manifest, trained["forget"].manifest)):
                found[name] = stood_for
            continue
        labels = [int(label) for label in np.unique(rows.labels) if label >= 0]
        named = _labels(manifest, rows.manifest, list(labels), f"data.{name}") or {}
        chosen: list[int | str] = [label for label in named.values() if label is not None]
        if chosen or not labels:
            conditions = config.Rows(classes=[*chosen] or None)
            found[name] = selection.select(manifest, conditions, settings.seed, name)
    return found


def _forgotten(settings: config.RunConfig, manifest: shards.Manifest, train: shards.Manifest) -> RowSet | None:
    """The held-out rows of the forgotten classes; None where the forget set is not chosen by class."""
    forget = settings.data.forget
    if forget is None or (forget.classes is None and forget.exclude_classes is None):
        return None
    return _same_classes(manifest, train, forget, settings.seed, "forget")


def _retained(settings: config.RunConfig, manifest: shards.Manifest, train: shards.Manifest) -> RowSet | None:
    """The held-out rows that are to be kept: of the retained classes, or all but those of the forgotten ones."""
    chosen = _same_classes(manifest, train, settings.data.retain or config.Rows(), settings.seed, "retain")
    forgotten = _forgotten(settings, manifest, train)
    if chosen and forgotten:
        keep = ~np.isin(chosen.rows, forgotten.rows)
        return replace(chosen, rows=chosen.rows[keep], labels=chosen.labels[keep])
    return chosen


def _manifest(settings: config.RunConfig) -> shards.Manifest | None:
    data, split = settings.evaluation.data, settings.evaluation.split
    return shards.load(data or settings.data.train, split) if data or split else None


def _same_classes(
    manifest: shards.Manifest, train: shards.Manifest, rows: config.Rows, seed: int, what: str
) -> RowSet | None:
    """The held-out rows of the same classes; None where the rows were chosen by ids or subjects.

    Raises ConfigError, which names the class, where the held-out shards do not have it or it cannot be matched.
    """
    if rows.ids is not None or rows.ids_from is not None or rows.subjects is not None:
        return None
    wanted = _labels(manifest, train, rows.classes, f"data.{what}.classes")
    unwanted = _labels(manifest, train, rows.exclude_classes, f"data.{what}.exclude_classes")
    if wanted and None in wanted.values():
        missing = next(name for name, label in wanted.items() if label is None)
        raise ConfigError(
            f"evaluation.data: {manifest.uri} has no class {missing!r}, which data.{what} names; measure on data that "
            "has it"
        )
    conditions = config.Rows(
        classes=None if wanted is None else [label for label in wanted.values() if label is not None],
        exclude_classes=None if unwanted is None else [label for label in unwanted.values() if label is not None],
    )
    return selection.select(manifest, conditions, seed, what)


def _labels(
    manifest: shards.Manifest, train: shards.Manifest, named: list[int | str] | None, where: str
) -> dict[str, int | None] | None:  # fmt: skip
    """{class: its held-out label, or None where there is none} of the classes that a condition names."""
    if named is None:
        return None
    labels = [selection.label(train, one, where) for one in named]
    return {
        train.class_name(label): classes.translated(label, train, manifest, f"evaluation.data, {where}")
        for label in labels
    }


def _limit(rows: RowSet, limit: int | None, seed: int) -> RowSet:
    if limit is None or len(rows) <= limit:
        return rows
    index = np.sort(order.generator(seed, 1 << 21).permutation(len(rows))[:limit])
    return replace(rows, rows=rows.rows[index], labels=rows.labels[index])
