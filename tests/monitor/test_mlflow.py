"""MLflow's own package, writing to the run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

from jetmoe_megatron.config import Run
from jetmoe_megatron.monitor.mlflow import MLflow
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.monitor.names import grouped
from tests.support import metrics, small_run, training, write_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MLflowRun


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLflow is told in the environment ends with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]


def record(step: int, loss: float) -> Record:
    return {
        "step": step,
        "phase": "stable",
        "lm_loss": loss,
        "grad_norm": 1.0,
        "grad_norm/moa": 0.5,
        "alarms": {"load/moe": "layer 3"},
        "dataset_tokens/../a//b?é": 10 * step,
    }


def found(run: Run) -> tuple[MlflowClient, MLflowRun]:
    from mlflow import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(tracking_uri=(Path(run.output_dir) / "logs/mlflow").as_uri())
    experiment = client.get_experiment_by_name("own")
    assert experiment is not None
    return client, client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]


def history(run: Run, name: str) -> list[tuple[int, float]]:
    client, only = found(run)
    return sorted((point.step, point.value) for point in client.get_metric_history(only.info.run_id, name))


def test_a_resumed_run_continues_its_own_and_has_each_step_once(tmp_path: Path) -> None:
    run = Run.model_validate(small_run(tmp_path, {"code": "c", "prose": "p"}, logging={"mlflow_experiment": "own"}))
    tracker = MLflow(run, 0)
    for step in (1, 2, 3):
        tracker.write(record(step, 5.0 - step))
    assert found(run)[1].info.status == "RUNNING"
    tracker.close()
    assert found(run)[1].info.status == "FINISHED"
    tracker = MLflow(run, 2)
    tracker.amend(2, {"held_out_loss": 4.5})
    for step in (3, 4):
        tracker.write(record(step, 6.0 - step))
    tracker.close()
    assert history(run, "train/lm_loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 2.0)]
    assert history(run, "train/held_out_loss") == [(2, 4.5)]
    assert history(run, "data/a..b_é_tokens") == [(step, 10 * step) for step in (1, 2, 3, 4)]
    parameters = found(run)[1].data.params
    assert parameters["optimizer.max_lr"] == "0.01" and parameters["phases.1.data.0.name"] == "code"


def test_what_a_killed_process_did_not_send_is_sent_by_the_next(tmp_path: Path) -> None:
    run = Run.model_validate(small_run(tmp_path, {"code": "c", "prose": "p"}, logging={"mlflow_experiment": "own"}))
    lines = tmp_path / "run/metrics.jsonl"
    lines.parent.mkdir()
    tracker = MLflow(run, 0)
    for step in range(1, 5):  # the first is sent at once, the others wait for the next request
        tracker.write(record(step, 5.0 - step))
    tracker._send()
    lines.write_text("".join(json.dumps(record(step, 5.0 - step)) + "\n" for step in range(1, 9)))
    tracker = MLflow(run, 6)
    tracker.write(record(7, 0.5))
    tracker.close()
    expected = [(step, 5.0 - step) for step in range(1, 7)] + [(7, 0.5)]
    assert history(run, "train/lm_loss") == expected


def test_a_run_that_starts_anew_is_a_new_run(tmp_path: Path) -> None:
    run = Run.model_validate(small_run(tmp_path, {"code": "c", "prose": "p"}, logging={"mlflow_experiment": "own"}))
    for loss in (4.0, 3.0):
        tracker = MLflow(run, 0)
        tracker.write(record(1, loss))
        tracker.close()
        assert history(run, "train/lm_loss") == [(1, loss)]


def test_what_a_server_did_not_take_is_sent_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jetmoe_megatron.monitor.mlflow._EVERY_SECONDS", 0.0)
    run = Run.model_validate(small_run(tmp_path, {"code": "c", "prose": "p"}, logging={"mlflow_experiment": "own"}))
    tracker = MLflow(run, 0)
    tracker.write(record(1, 4.0))
    with (
        patch.object(tracker.client, "log_batch", side_effect=OSError("no network")),
        pytest.raises(OSError, match="no network"),
    ):
        tracker.write(record(2, 3.0))
    tracker.write(record(2, 3.0))
    tracker.close()
    assert history(run, "train/lm_loss") == [(1, 4.0), (2, 3.0)]


def test_each_number_of_a_run_arrives_in_a_group(tmp_path: Path, data: dict[str, str]) -> None:
    tree = small_run(tmp_path, data, logging={"mlflow": True, "mlflow_experiment": "own"})
    tree["evaluation"] = {"data": [{"name": "web", "path": data["code"]}], "sequences": 2}
    trained = training(write_run(tmp_path, tree)).run()
    assert trained.returncode == 0, trained.stderr
    assert "MLflow" not in trained.stderr
    last = metrics(tmp_path / "run")[-1]
    expected = {key: value for key, value in grouped(last).items() if not isinstance(value, str)}
    sent = found(Run.model_validate(tree))[1].data.metrics
    assert {key: sent[key] for key in expected} == expected


def test_groups() -> None:
    names = {
        "step": "train/step",
        "lm_loss": "train/lm_loss",
        "grad_norm/moa": "train/grad_norm_moa",
        "held_out_loss": "train/held_out_loss",
        "held_out_loss/web": "held_out/web",
        "moa_balance_loss": "routers/moa/balance_loss",
        "moe_load_imbalance": "routers/moe/load_imbalance",
        "dataset_tokens/web/de": "data/web.de_tokens",
        "held_out_loss/web/de": "held_out/web.de",
        "dataset_epochs/web": "data/web_epochs",
        "tokens_per_second": "speed/tokens_per_second",
        "tflops_per_rank": "speed/tflops_per_rank",
        "data_wait_seconds": "time/data_wait_seconds",
        "goodput": "time/goodput",
        "mfu": "speed/mfu",
        "slowest_rank_ratio": "speed/slowest_rank_ratio",
        "rank_hours": "time/rank_hours",
        "routers/moa/load_max": "routers/moa/load_max",
        "bits_per_byte/web": "held_out/web_bits_per_byte",
        "host_memory_gb_per_1000_steps": "memory/host_memory_gb_per_1000_steps",
        "peak_memory_gb": "memory/peak_memory_gb",
        "memory/weights": "memory/weights",
    }
    assert grouped(dict.fromkeys(names, 1.0)) == dict.fromkeys(names.values(), 1.0)
