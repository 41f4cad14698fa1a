"""The same pipeline on this machine, by kfp's local runner: a process a step, no cluster.

That runner takes a condition it cannot evaluate for one that does not hold, and has skipped both branches of a pipeline without a word.
So what counts is what the cycle's records say afterwards.
"""

import tempfile
from pathlib import Path

from pipelines import kubeflow, standing
from pipelines.compiling import quiet
from pipelines.place import Place
from pipelines.steps import HERE
from unlearn.cycles.cycle import Cycle
from unlearn.errors import CycleError


def run(cycle: Cycle, source: str, to: str = HERE, outputs: str | None = None) -> standing.Standing:
    """Run the pipeline to its end. source: a path or s3:// of the cycle's file; outputs: a folder that keeps the artifacts. Steps are not
    tried again. Raises MissingExtra, and CycleError where a step has failed or the cycle has not come to its end."""
    kubeflow.required()
    from kfp import local

    from pipelines.cycle import pipeline

    made = pipeline(cycle.rungs, Place(retries=0))
    with tempfile.TemporaryDirectory(prefix="unlearn-pipeline-") as scratch, quiet():
        local.init(
            local.SubprocessRunner(use_venv=False), pipeline_root=outputs or scratch, workspace_root=str(Path(scratch) / "workspace")
        )  # fmt: skip
        try:
            made(cycle=source, to=to)
        except RuntimeError as e:  # a step has failed, whose log was shown
            raise CycleError(f"{' '.join(str(e).split())}; run it again, it goes on where it was") from None
    now = standing.of(cycle)
    if now.unfinished:
        raise CycleError(
            f"the pipeline has ended, and {now.told()['last cycle']}: kfp's local runner has left out a step"
        )
    return now
