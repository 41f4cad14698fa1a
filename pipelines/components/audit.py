"""Component `audit`: ask whether one rung has really forgotten. In the pipeline where the cycle asks for it.

Reads the run folder and the shards; writes audit.json and audit.html in the run folder, and the cycle's record of them;
the gate may hold the figures to its limits. The page holds no image.
"""

from kfp import dsl
from kfp.dsl import HTML, Input, Metrics, Model, Output


@dsl.component(base_image="unlearn", install_kfp_package=False)
def audit(
    cycle: str, id: str, rung: int, model: Input[Model], figures: Output[Metrics], page: Output[HTML]
):  # fmt: skip
    """Audit one rung of the cycle.

    Args:
        cycle: URI of the CYCLE.yaml.
        id: Of the cycle.
        rung: Which one.
        model: What was trained.
        figures: Tests that passed, failed or show nothing, and what was measured on the unlearned model.
        page: The audit's page.
    """
    from pipelines import steps

    steps.audit(cycle, id, rung, figures, page)
