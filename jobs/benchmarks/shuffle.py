"""How well the order of samples is shuffled: the mean distance that a sample travels from its place in the data, and
how many classes a global batch holds, each against a full shuffle; for rows that are sorted by class, as most sets are
stored.

A full shuffle moves a sample by a third of the set on average. A window of `data.shuffle_rows` holds whole row groups
that come in random order, so samples travel as far with a small one; what it costs is that a batch is of few classes.

python -m jobs.benchmarks.shuffle [--rows 1300000] [--classes 1000] [--group 256] [--window N ...] [--batch 64]
"""

import argparse

import numpy as np

from unlearn import config
from unlearn.data import order

WINDOWS = (256, 4096, 65_536, config.Data.model_fields["shuffle_rows"].default)


def quality(rows: int, classes: int, group: int, window: int, batch: int, seed: int = 0) -> tuple[float, float]:
    """(mean distance as a share of the set, mean number of classes in a batch) of one epoch."""
    taken = order.Stream(np.arange(rows), np.arange(0, rows, group), seed, 0, window).take(0, rows)
    distance = np.abs(taken - np.arange(rows)).mean() / rows
    labels = taken[: rows // batch * batch].reshape(-1, batch) * classes // rows
    ordered = np.sort(labels, axis=1)
    return float(distance), float((np.diff(ordered, axis=1) > 0).sum(axis=1).mean() + 1)


def shuffle(options: argparse.Namespace) -> None:
    shape = options.rows, options.classes, options.group
    full = quality(*shape, options.rows, options.batch)
    print(f"full shuffle: distance {full[0]:.3f} of the set, {full[1]:.1f} classes in a batch of {options.batch}")
    for window in options.window:
        distance, held = quality(*shape, window, options.batch)
        told = f"{distance / full[0]:.2f} of the full distance, {held / full[1]:.2f} of its classes ({held:.1f})"
        print(f"shuffle_rows {window}: {told}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--group", type=int, default=256, help="rows of a row group")
    parser.add_argument("--window", type=int, nargs="+", default=WINDOWS, help="values of data.shuffle_rows")
    parser.add_argument("--batch", type=int, default=64, help="rows of a global batch")
    shuffle(parser.parse_args())
