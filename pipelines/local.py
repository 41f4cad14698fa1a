"""The same pipeline on this machine, by kfp's local runner: a process a step, no cluster.

That runner takes a condition it cannot evaluate for one that does not hold, and has skipped both branches of a pipeline
without a word. So what counts is what the cycle's records say afterwards.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipelines import kubeflow, standing
from pipelines.compiling import quiet
from pipelines.place import IMAGE, Place
from pipelines.steps import HERE
from unlearn.cycles.cycle import Cycle
from unlearn.errors import CycleError


def run(
    cycle: Cycle, source: str, to: str = HERE, parameters: Mapping[str, str] = {}, image: str = IMAGE,
    outputs: str | None = None,
) -> standing.Standing:  # fmt: skip
    """Run the pipeline to its end. Steps are not tried again.

    source: a path or s3:// of the cycle's file; parameters: others of the pipeline; image: of a RayJob that trains;
    outputs: a folder that keeps the artifacts. Raises MissingExtra, and CycleError where a step has failed or the cycle
    has not come to its end."""
    kubeflow.required()
    from kfp import local

    from pipelines.cycle import pipeline

    made = pipeline(cycle.rungs, Place(image, retries=0), audited=cycle.audit is not None)
    with tempfile.TemporaryDirectory(prefix="unlearn-pipeline-") as scratch, quiet():
        workspace = str(Path(scratch) / "workspace")
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=outputs or scratch, workspace_root=workspace)
        try:
            made(cycle=source, to=to, **parameters)
        except RuntimeError as e:  # a step has failed, whose log was shown
            why = " ".join(re.sub(r"\x1b\[\d+m", "", str(e)).split())  # kfp colours its words
            raise CycleError(f"{why} Run it again: it goes on where it was") from None
    now = standing.of(cycle)
    if now.unfinished:
        raise CycleError(
            f"the pipeline has ended, and {now.told()['last cycle']}: kfp's local runner has left out a step"
        )
    return now
