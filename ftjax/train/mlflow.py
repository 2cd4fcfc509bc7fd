"""Tracking at MLflow: metrics, settings and answers of a run, on whatever server or store `MLFLOW_TRACKING_URI` names."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftjax.errors import UserError

EXPERIMENT = "ftjax"  # unless MLFLOW_EXPERIMENT_NAME names another
TAG = "ftjax.run"  # by which a run that goes on is found again
MOST, LONGEST = 100, 6000  # settings of one request, and letters of one: limits of MLflow's servers


class MlflowRun:
    """A run at MLflow."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], run_id: str | None):
        """Begin a run, or go on with the one that has this id.

        Raises UserError if the store or server cannot be reached.
        """
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        try:
            self._client = MlflowClient()
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            there = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if there is None else there.experiment_id
            found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run_id}'") if run_id else []
            if found:
                self._run = found[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
                return
            self._run = self._client.create_run(experiment, run_name=folder.name, tags={TAG: run_id or ""}).info.run_id
            given = [Param(key, str(value)[:LONGEST]) for key, value in settings.items()]
            for start in range(0, len(given), MOST):
                self._client.log_batch(self._run, params=given[start : start + MOST])
        except (MlflowException, OSError) as error:
            raise UserError(
                f"training.report_to: mlflow cannot start: {str(error).strip().splitlines()[0]}. Set MLFLOW_TRACKING_URI to a "
                "server or a store, or leave mlflow out"
            ) from None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()])

    def log_texts(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Log answers as a file of JSON lines."""
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        self._client.log_text(self._run, text, f"{name}/step-{step:06d}.jsonl")

    def finish(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)
