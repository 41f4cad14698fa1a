"""Component `evaluate`: measure one rung of the cycle, old requests apart from new ones.

Reads the run folder and the shards; writes metrics.json and report.html there. The page is shown in Kubeflow's, without
pictures of forgotten images.
"""

from kfp import dsl
from kfp.dsl import HTML, Input, Metrics, Model, Output


@dsl.component(base_image="unlearn", install_kfp_package=False)
def evaluate(
    cycle: str, id: str, rung: int, model: Input[Model], metrics: Output[Metrics], report: Output[HTML]
):  # fmt: skip
    """Measure one rung of the cycle.

    Args:
        cycle: URI of the CYCLE.yaml.
        id: Of the cycle.
        rung: Which one.
        model: What was trained.
        metrics: Its figures under the main view.
        report: The run's page.
    """
    from pipelines import steps

    steps.evaluate(cycle, id, rung, metrics, report)
