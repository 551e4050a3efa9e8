"""Metrics for MLflow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from aetheria.core import Logger
from aetheria.errors import MissingDependencyError
from aetheria.registry import Registry

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MLflowLogger"]

_RUN_TAG = "aetheria.run_id"
_LONGEST_PARAMETER = 6000  # characters, MLflow's own limit


@Registry.register_logger("MLflowLogger")
class MLflowLogger(Logger):
    """Logs to the MLflow run that carries this run's id as a tag, so that a continued run continues there too.

    Args:
        experiment: the MLflow experiment; made if it is not there.
        tracking_uri: where MLflow keeps its runs: the address of a server, "sqlite:///mlflow.db", a folder. None leaves
            it to MLflow (`MLFLOW_TRACKING_URI`, or its default).

    Raises:
        MissingDependencyError: mlflow (or mlflow-skinny) is not installed.
    """

    def __init__(self, experiment: str = "aetheria", tracking_uri: str | None = None) -> None:
        try:
            import mlflow  # noqa: F401, PLC0415 - optional
        except ImportError as error:
            raise MissingDependencyError.of("mlflow-skinny", "mlflow", "MLflowLogger") from error
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self._client: MlflowClient | None = None
        self._status = "FINISHED"

    def log_hyperparameters(self, config: dict[str, Any]) -> None:
        """Writes the configuration as parameters named like its keys, `model_params.learning_rate`.

        MLflow does not let a parameter change: where a continued run has another value, the first one stays.
        """
        from mlflow.entities import Param  # noqa: PLC0415

        client = self._open()
        known = client.get_run(self._id).data.params
        parameters = [
            Param(name, str(value)[:_LONGEST_PARAMETER]) for name, value in _flat(config).items() if name not in known
        ]
        client.log_batch(self._id, params=parameters)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Logs the metrics with their step."""
        from mlflow.entities import Metric  # noqa: PLC0415

        now = round(1000 * time.time())
        client = self._open()
        client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def _open(self) -> MlflowClient:
        if self._client is None:
            from mlflow import MlflowClient  # noqa: PLC0415

            self._client = MlflowClient(self.tracking_uri)
            self._id = _find_or_create_run(self._client, self.experiment, self.context.run_id)
        return self._client

    def on_exception(self, error: BaseException) -> None:
        """Remembers that the run failed."""
        self._status = "FAILED"

    def teardown(self) -> None:
        """Closes the run."""
        if self._client is not None:
            self._client.set_terminated(self._id, self._status)
            self._client = None


def _find_or_create_run(client: MlflowClient, experiment: str, run_id: str) -> str:
    """Returns the id that MLflow gave to this run, now or in an earlier session."""
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    runs = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run_id}'", max_results=1)
    if not runs:
        return str(client.create_run(experiment_id, tags={_RUN_TAG: run_id}, run_name=run_id).info.run_id)
    client.update_run(runs[0].info.run_id, status="RUNNING")
    return str(runs[0].info.run_id)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
