"""Component `release`: publish a rung that has passed the gate, certify it and make it current.

Reads the run folder and the private key; writes the release, the pointer, the cycle's outcome.json, and the ledger
(released).
"""

from kfp import dsl
from kfp.dsl import Input, Model, Output


@dsl.component(base_image="unlearn", install_kfp_package=False)
def release(cycle: str, id: str, rung: int, model: Input[Model], released: Output[Model]) -> str:
    """Publish a rung that has passed.

    Args:
        cycle: URI of the CYCLE.yaml.
        id: Of the cycle.
        rung: Which one.
        model: What was trained.
        released: Its metadata says where the release is, and its version.

    Returns:
        The version of the release.
    """
    from pipelines import steps

    return steps.release(cycle, id, rung, released)
