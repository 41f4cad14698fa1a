"""The end of a run: its newest checkpoint as model folders, whole, in float32."""

from unlearn import __version__
from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError
from unlearn.models import weights
from unlearn.run import Run
from unlearn.training import ranks
from unlearn.training.checkpoint import AVERAGE, Checkpoints, Saved, TrainerState


def export(run: Run) -> str:
    """Write `run_dir/model`: the original weights with the trained ones in their place. Returns its URI.

    Where the run kept a moving average of them, `run_dir/model_ema` holds that. What was not trained is copied from the
    original, so it keeps its bytes. Every rank of a group calls it: they check the checkpoint together, and the first
    one writes.
    """
    checkpoints = Checkpoints(run.folder, run.settings.training.keep_checkpoints)
    step = checkpoints.newest()
    if not step:
        raise CheckpointError(f"{run.folder}: no checkpoint to export")
    with checkpoints.open(step) as saved:
        return ranks.from_first(lambda: _write(run, saved, checkpoints.state(step)))


def _write(run: Run, saved: Saved, state: TrainerState) -> str:
    model, ema = weights.build(run.settings.model, run.settings.seed), run.settings.training.ema
    card = {
        "software": f"unlearn {__version__}", "run": run.settings.name, "method": run.settings.method.name,
        "from": run.settings.model.weights,
        "config_hash": state.config, "data": state.data, "step": state.step, "samples": state.samples,
    }  # fmt: skip
    card |= {"without": run.without} if run.without else {}
    folder = Storage(run.folder)
    if ema is not None:
        saved.weights(model, AVERAGE)
        weights.write(model, folder.where("model_ema"), card | {"ema": ema})
    saved.weights(model)
    uri = folder.where("model")
    weights.write(model, uri, card)
    return uri
