"""MLflow, where its client is installed: a run for each point of a sweep. To be imported where Ray is needed."""

import logging
from collections.abc import Callable
from typing import Any

from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  an extra
from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.experiment import Trial

from jobs.callbacks import figures
from unlearn.errors import ConfigError
from unlearn.search.space import Sweep

log = logging.getLogger(__name__)

POINT, SWEEP = "unlearn.point", "unlearn.sweep"  # tags of a run


class Runs(MLflowLoggerCallback):
    """A server that does not answer later is told once, and logged to no more: a sweep does not depend on it."""

    def __init__(self, sweep: Sweep, uri: str):
        """Raises ConfigError where the server, or the database, cannot be used."""
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        super().__init__(uri, experiment_name=sweep.name)
        self.sweep, self.lost = sweep, False
        try:
            self.setup()
        except Exception as e:  # whatever the client or the database's driver raises
            raise ConfigError(f"log_to mlflow: {self._where}: {self._said(e)}") from None

    @property
    def _where(self) -> str:
        """The address without what may be a password."""
        uri = self.tracking_uri or ""
        return uri if uri.startswith("sqlite:") else f"{uri.partition('://')[0]}://..."

    def _said(self, error: Exception) -> str:
        return " ".join(str(error).replace((self.tracking_uri or "").rstrip("/"), self._where).split())[:300]

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.tracking_uri)

    def log_trial_start(self, trial: Trial) -> None:
        self._unless_lost(self._start, trial)

    def log_trial_result(self, iteration: int, trial: Trial, result: dict) -> None:
        if told := {name.replace("[", "/").replace("]", ""): value for name, value in figures(result).items()}:
            self._unless_lost(super().log_trial_result, iteration, trial, told)

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        self._unless_lost(self._end, trial, failed)

    def _start(self, trial: Trial) -> None:
        point = trial.config["point"]
        tags = {POINT: point, SWEEP: self.sweep.sweep_dir}
        same = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        known = self.client.search_runs([str(self.mlflow_util.experiment_id)], same, max_results=1)
        run = known[0] if known else self.mlflow_util.start_run(point, tags)
        self._trial_runs[trial] = run.info.run_id
        self.mlflow_util.log_params(trial.config.get("parameters", {}), run.info.run_id)

    def _end(self, trial: Trial, failed: bool) -> None:
        nothing = not self.client.get_run(self._trial_runs[trial]).data.metrics
        super().log_trial_end(trial, failed or nothing)

    def _unless_lost(self, call: Callable[..., None], *arguments: Any) -> None:
        if self.lost:
            return
        try:
            call(*arguments)
        except MlflowException as e:
            self.lost = True
            log.warning("nothing more is logged to MLflow: %s", self._said(e))
