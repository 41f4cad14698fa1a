"""TensorBoard and MLflow beside the records of a sweep, by Ray Tune's own callbacks. Nothing is read back from either.

A point is one folder of TensorBoard's and one run of MLflow's, also where the sweep was stopped in between: its
parameters, and the means of its figures by step. To be imported where Ray is needed.
"""

import logging
import os
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.result import TIMESTEPS_TOTAL

from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, MissingExtra
from unlearn.search.space import Sweep

log = logging.getLogger(__name__)

BOARD, TRACKED = "tensorboard", "mlflow.db"  # in the sweep's folder


def wanted(sweep: Sweep, scratch: Path) -> list[Callback]:
    """The callbacks of a sweep. scratch: for TensorBoard's files, where the sweep's folder is on S3.

    Raises MissingExtra, and ConfigError where MLflow does not answer."""
    made: list[Callback] = []
    if "tensorboard" in sweep.log_to:
        made.append(Board(sweep, scratch))
    if "mlflow" in sweep.log_to:
        try:
            import mlflow  # pyright: ignore[reportMissingImports]  # noqa: F401
        except ImportError:
            raise MissingExtra("mlflow-skinny", "mlflow", "log_to: mlflow") from None
        from jobs.mlflow_runs import Runs

        made.append(Runs(sweep, tracking_uri(sweep)))
    return made


def tracking_uri(sweep: Sweep) -> str:
    """Where MLflow keeps its runs. Raises ConfigError where that is not said and cannot be the sweep's folder."""
    if uri := sweep.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    folder = Storage(sweep.sweep_dir)
    if not folder.is_local():
        raise ConfigError(
            f"log_to mlflow: SQLite cannot lie in {sweep.sweep_dir}: name an MLflow server in tracking_uri, or in the "
            "environment variable MLFLOW_TRACKING_URI"
        )
    Path(folder.uri).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder.where(TRACKED)}"


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Of what Ray Tune knows of a stage the figures, whose names have a dot, and the step; nothing where it failed."""
    if "step" not in result:
        return {}
    return {name: value for name, value in result.items() if "." in name} | {TIMESTEPS_TOTAL: result["step"]}


class Board(TBXLoggerCallback):
    """TensorBoard: figures by step, and the parameters in its tab HPARAMS."""

    def __init__(self, sweep: Sweep, scratch: Path):
        super().__init__()
        self.folder = Storage(Storage(sweep.sweep_dir).where(BOARD))
        self.files = Path(self.folder.uri) if self.folder.is_local() else scratch / BOARD

    def log_trial_start(self, trial: Trial) -> None:
        self._trial_writer[trial] = self._summary_writer_cls(str(self.files / trial.config["point"]))
        self._trial_result[trial] = {}

    def log_trial_result(self, iteration: int, trial: Trial, result: dict) -> None:
        if told := figures(result):
            super().log_trial_result(iteration, trial, told)

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        super().log_trial_end(trial, failed)
        if not self.folder.is_local():
            for path in (self.files / trial.config["point"]).iterdir():
                self.folder.upload(path, f"{trial.config['point']}/{path.name}")
