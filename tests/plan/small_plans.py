"""A small run on a GPU for which its settings matter: what several tests of plans take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.config.hardware import Assumed, Hardware
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.world import rehearsing_processes
from tests.support import small_run


def hardware(memory_gb: float = 80) -> Hardware:
    """Slow enough that what is computed and sent counts, and not only the number of kernels."""
    return Hardware(
        gpu="Small 1",
        bf16_tflops=0.001,
        fp32_tflops=0.0005,
        memory_gb=memory_gb,
        memory_tb_per_second=0.0005,
        nvlink_gb_per_second=0.2,
        network_gbit_per_second=1,
        gpus_per_node=2,
        dollars_per_gpu_hour=1,
        assumed=Assumed(kernel_seconds=1e-7, host_wait_seconds=1e-6, transfer_seconds=1e-6, reserved_gb=0),
    )


def run_tree(**changes: Any) -> dict[str, Any]:
    data = {"code": "unused/code", "prose": "unused/prose"}
    return small_run(Path("unused"), data, **{"model__num_layers": 4, "precision": "bf16", **changes})


def run(**changes: Any) -> Run:
    return Run.model_validate(run_tree(**changes))


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkerProcesses]:
    with rehearsing_processes() as found:
        yield found
