"""Component `close`: the exit handler. Tells from the ledger and the cycle's records how things stand, whatever became
of the run.

kfp hands an exit handler the run's state, which its server says is "Running" whatever happened. It is taken only since
kfp's local runner knows exit handlers by it; nobody looks at it.
"""

from kfp import dsl
from kfp.dsl import HTML, Metrics, Output, PipelineTaskFinalStatus


@dsl.component(base_image="unlearn", install_kfp_package=False)
def close(cycle: str, figures: Output[Metrics], page: Output[HTML], status: PipelineTaskFinalStatus):
    """Tell how things stand.

    Args:
        cycle: URI of the CYCLE.yaml.
        figures: Requests that are pending and overdue.
        page: The same, and how the last cycle ended.
        status: Not used.
    """
    from pipelines import steps

    steps.close(cycle, figures, page)
