"""Component `select`: take the open deletion requests into a cycle, or find the one that was begun and has not ended.

Reads the ledger, the manifest of the shards and the base model's card; writes the cycle's selection.json, and the
ledger (scheduled). The status is called Output, since kfp's local runner looks a condition's value up under that name
alone.
"""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Dataset, Output


@dsl.component(base_image="unlearn", install_kfp_package=False)
def select(
    cycle: str, rungs: int, audited: str, requests: Output[Dataset]
) -> NamedTuple("Selected", [("Output", str), ("id", str)]):  # pyright: ignore  kfp reads this form  # fmt: skip
    """Take the open deletion requests into a cycle.

    Args:
        cycle: URI of the CYCLE.yaml.
        rungs: How many rungs this pipeline has, which must be the cycle's.
        audited: Whether this pipeline audits them, which must be as the cycle asks; yes or no.
        requests: How many requests and images there are, and the hash of the data.

    Returns:
        Output: selected; nothing where no request is open; due where retraining is.
        id: Of the cycle.
    """
    from pipelines import steps

    return steps.select(cycle, rungs, audited, requests)
