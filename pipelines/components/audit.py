"""Component `audit`: ask whether one rung has really forgotten. In the pipeline where an audit is configured.

Reads the run folder, the shards and AUDIT.yaml; writes audit.json and audit.html in the run folder, which the gate may
hold to its limits. The page holds no image.
"""

from kfp import dsl
from kfp.dsl import HTML, Input, Metrics, Model, Output


@dsl.component(base_image="unlearn", install_kfp_package=False)
def audit(
    cycle: str, id: str, rung: int, settings: str, model: Input[Model], figures: Output[Metrics], page: Output[HTML]
):  # fmt: skip
    """Audit one rung of the cycle.

    Args:
        cycle: URI of the CYCLE.yaml.
        id: Of the cycle.
        rung: Which one.
        settings: URI of the AUDIT.yaml.
        model: What was trained.
        figures: Those of the unlearned model.
        page: The audit's page.
    """
    from pipelines import steps

    steps.audit(cycle, id, rung, settings, figures, page)
