"""What a SWEEP.yaml contradicts: checks across its keys, and not of its run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from unlearn.search.domain import ordered

if TYPE_CHECKING:
    from unlearn.search.space import Sweep


def contradictions(sweep: Sweep) -> Iterator[str]:
    """Every pair of values that cannot both be meant, one sentence each."""
    ranges = [key for key, domain in sweep.search.items() if domain.ends]
    if sweep.search_by == "grid" and ranges:
        yield f"search_by grid: {', '.join(ranges)} is a range; give grid or choice, or search by random, tpe or nsga2"
    if sweep.search_by != "grid" and sweep.budget == type(sweep.budget)():
        yield f"budget: search_by {sweep.search_by} has no end of its own; give points, seconds or flops"
    if sweep.storage and sweep.search_by not in ("tpe", "nsga2"):
        yield f"storage is for tpe and nsga2; search_by {sweep.search_by} needs none"
    if sweep.measure_every and not sweep.in_stages:
        yield "measure_every is for stop_early asha or median, and for search_by pbt"
    if sweep.tracking_uri and "mlflow" not in sweep.log_to:
        yield "tracking_uri is for log_to: [mlflow]"
    if sweep.search_by == "pbt":
        yield from _of_a_population(sweep)
    for key, domain in sweep.search.items():
        if domain.same_as is not None:
            if domain.same_as not in sweep.search:
                yield f"search.{key}: same_as names {domain.same_as}, which is not searched"
            elif sweep.search[domain.same_as].same_as is not None:
                yield f"search.{key}: same_as names {domain.same_as}, which is tied itself; name what that is tied to"
        if key in domain.when:
            yield f"search.{key}: when names the key itself"
    try:
        ordered(sweep.search)
    except ValueError as e:
        yield str(e)


def _of_a_population(sweep: Sweep) -> Iterator[str]:
    for key in sweep.search:
        if key != "training.lr":
            yield (
                f"search.{key}: search_by pbt changes values in mid-run, which only training.lr allows: with "
                f"another {key} it would be another training; set one value, or search by random, tpe or nsga2"
            )
    if "training.lr" in sweep.search and not sweep.search["training.lr"].ends:
        yield "search.training.lr: search_by pbt needs a range: loguniform or uniform"
    if sweep.stop_early != "none":
        yield "stop_early: search_by pbt has the worst go on from the best; leave it out"
    if sweep.budget.seconds or sweep.budget.flops or (sweep.budget.points or 2) < 2:
        yield "budget: search_by pbt trains all its points at one time, to their end: give points alone, 2 or more"
