"""Component `unlearn`: train one rung of the cycle from the base model, here or as a job elsewhere whose log is this
step's.

Reads the base and the shards; writes the run folder in the cycle's, and the ledger (trained). What was trained is not
trained again; a job that is still at work is found and followed.
"""

from kfp import dsl
from kfp.dsl import Model, Output


@dsl.component(base_image="unlearn", install_kfp_package=False)
def unlearn(
    cycle: str, id: str, rung: int, to: str, overlay: str, image: str, namespace: str, priority: str,
    model: Output[Model],
):  # fmt: skip
    """Train one rung of the cycle.

    Args:
        cycle: URI of the CYCLE.yaml.
        id: Of the cycle.
        rung: 0 is the cycle's run as it stands, 1 the first rung of its ladder.
        to: Where to train; here, k8s (a RayJob) or http://HEAD:8265 (a Ray cluster).
        overlay: Of the RayJob.
        image: Of the RayJob, the one this step runs in, so that Ray's versions agree.
        namespace: Of the RayJob.
        priority: Kueue's priority class of the RayJob.
        model: Its metadata says where the weights are, and their checksum.
    """
    from pipelines import steps

    steps.unlearn(cycle, id, rung, to, overlay, image, namespace, priority, model)
