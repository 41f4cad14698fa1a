"""Component `judge`: hold the figures of one rung, and of its audit where there is one, against the cycle's gate.

Reads metrics.json, audit.json and the current release; writes the verdict to the cycle's folder, and the ledger
(verified).
"""

from kfp import dsl
from kfp.dsl import Input, Markdown, Metrics, Output


@dsl.component(base_image="unlearn", install_kfp_package=False)
def judge(cycle: str, id: str, rung: int, metrics: Input[Metrics], reasons: Output[Markdown]) -> str:
    """Hold one rung against the gate.

    Args:
        cycle: URI of the CYCLE.yaml.
        id: Of the cycle.
        rung: Which one.
        metrics: What was measured.
        reasons: Every limit with the value, and why it is kept or not.

    Returns:
        passed or refused.
    """
    from pipelines import steps

    return steps.judge(cycle, id, rung, reasons)
