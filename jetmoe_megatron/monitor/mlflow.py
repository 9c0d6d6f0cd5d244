"""MLflow: the numbers of metrics.jsonl in groups, to the server of MLFLOW_TRACKING_URI or to the run folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.monitor.jsonl import last_records
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.monitor.names import grouped
from jetmoe_megatron.monitor.run_id import run_id

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.entities import Run as MLflowRun

_EVERY_SECONDS = 10.0  # between two requests, for which all ranks wait
_MOST_METRICS, _MOST_PARAMETERS = 1000, 100  # of one request: MLflow's utils/validation.py
_STEP = "train/step"
_TAG = "jetmoe.run"
_SETTINGS = {
    # All ranks wait while a server does not answer. The monitor tries again, more patiently.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # newer versions refuse a folder, which needs no database
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MLflow:
    def __init__(self, run: Run, step: int) -> None:
        """MLflow cannot replace numbers: steps that an earlier process sent, and that are run again, are left out.
        What a killed process has not sent is sent now."""
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # an optional package, like wandb

        folder = (RunFolder.of(run).logs / "mlflow").resolve()
        self.client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or folder.as_uri())
        own = self._find(run, step)
        self.id = own.info.run_id
        self.last_step = own.data.metrics.get(_STEP, 0)
        self.waiting: list[Metric] = []
        self.send_at = 0.0
        if not own.data.params:
            self._send_parameters(run)
        self.client.update_run(self.id, status="RUNNING")
        for record in last_records(RunFolder.of(run).metrics):
            if record["step"] <= step:
                self.write(record)

    def write(self, record: Record) -> None:
        step = int(record["step"])
        if step > self.last_step:
            self.amend(step, record)

    def amend(self, step: int, values: Record) -> None:
        from mlflow.entities import Metric

        if time.monotonic() >= self.send_at:
            self._send()  # before the values are taken: if it fails, the monitor brings them again
            self.send_at = time.monotonic() + _EVERY_SECONDS
        now = time.time_ns() // 1_000_000
        for key, value in grouped(values).items():
            if isinstance(value, int | float):
                self.waiting.append(Metric(_allowed(key), float(value), now, step))

    def close(self) -> None:
        self._send()
        self.client.set_terminated(self.id)

    def _find(self, run: Run, step: int) -> MLflowRun:
        """The newest run of this run folder. It is created if there is none, or if training starts anew."""
        name = run.logging.mlflow_experiment
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        named = f"tags.`{_TAG}` = '{run_id(run)}'"
        newest = self.client.search_runs([number], named, max_results=1, order_by=["attributes.start_time DESC"])
        if newest and (step > 0 or _STEP not in newest[0].data.metrics):
            return newest[0]
        return self.client.create_run(number, run_name=run.name, tags={_TAG: run_id(run)})

    def _send(self) -> None:
        while self.waiting:
            self.client.log_batch(self.id, metrics=self.waiting[:_MOST_METRICS])
            del self.waiting[:_MOST_METRICS]

    def _send_parameters(self, run: Run) -> None:
        from mlflow.entities import Param

        parameters = [Param(_allowed(key), str(value)) for key, value in _leaves(run.model_dump())]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            self.client.log_batch(self.id, params=parameters[first : first + _MOST_PARAMETERS])


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(`optimizer.max_lr`, value) of each setting; a list counts from 0, as in an override."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if inner is None:
        yield path, tree
        return
    for key, value in inner:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _allowed(key: str) -> str:
    """The key without what MLflow refuses in a name: data sets may have any."""
    return "/".join(re.sub(r"[^-\w. ]", "_", part).strip(".") or "_" for part in key.split("/"))[:250]
