"""Component `give_up`: no rung has passed the gate. The requests are open again, and retraining is due.

Writes the cycle's record of it, and the ledger (received).
"""

from kfp import dsl


@dsl.component(base_image="unlearn", install_kfp_package=False)
def give_up(cycle: str, id: str):
    """End a cycle without a release.

    Args:
        cycle: URI of the CYCLE.yaml.
        id: Of the cycle.
    """
    from pipelines import steps

    steps.give_up(cycle, id)
