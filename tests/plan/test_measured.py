"""Shares of the peak rates from a measured step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.measured import with_measured_shares
from jetmoe_megatron.plan.plan import make_plan
from tests.plan.small_plans import hardware, processes, run

__all__ = ["processes"]


def measured(folder: Path, seconds: float, **changes: Any) -> Path:
    file = folder / "step.json"
    step = {
        "gpu": "NVIDIA Small 1",
        "origin": "by hand",
        "run": run().model_dump(mode="json"),
        "micro_batches": 4,
        "seconds": seconds,
        "peak_bytes": 3_000_000,
    }
    file.write_text(json.dumps({**step, **changes}))
    return file


def test_a_rehearsal_takes_as_long_as_the_step_did(tmp_path: Path, processes: WorkerProcesses) -> None:
    own = run()
    assert own.batch.global_tokens == 4 * own.batch.micro_sequences * own.batch.sequence_length
    assumed = make_plan(own, 1, hardware(), processes=processes).estimate.step_seconds
    found = with_measured_shares(hardware(), measured(tmp_path, 1.5 * assumed), processes)
    assert make_plan(own, 1, found, processes=processes).estimate.step_seconds == pytest.approx(1.5 * assumed, rel=1e-3)
    ratio = found.assumed.matmul / hardware().assumed.matmul
    assert 0.6 < ratio < 0.7  # nearly all is computing
    assert found.assumed.memory / hardware().assumed.memory == pytest.approx(ratio)
    assert found.assumed.shares_from.startswith("measured, by hand; its tensors held 0.00 GB, and ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "NVIDIA H200"}, "was measured on NVIDIA H200, which is no Small 1"),
        ({"seconds": 1e-9}, "a step of 1e-09 s cannot be"),
        ({"seconds": -1}, "seconds: must be greater than 0, not -1"),
        ({"extra": 1}, "extra: unknown key"),
    ],
)
def test_bad_measurements(tmp_path: Path, processes: WorkerProcesses, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        with_measured_shares(hardware(), measured(tmp_path, **{"seconds": 1.0, **changes}), processes)
    assert words in str(error.value) and "\n" not in str(error.value)
