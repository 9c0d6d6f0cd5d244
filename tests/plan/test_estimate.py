"""Times from rates, with rehearsals that are made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jetmoe_megatron.config.flops import step_flops
from jetmoe_megatron.config.hardware import Assumed, Hardware
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.estimate import bytes_needed, estimate, kernel_seconds, link, stage_time, transfer_seconds
from jetmoe_megatron.plan.rehearsal import Kernels, Memory, Rehearsal, Transfers
from tests.parallel.test_equal_to_one_process import run_tree

# 10^12 FLOP/s in matmuls, half of it in scores; 10^11 bytes/s of memory; 10^10 of NVLink, 10^9 of a GPU's network.
ASSUMED = Assumed(
    matmul=1.0,
    attention=0.5,
    memory=1.0,
    nvlink=1.0,
    network=1.0,
    kernel_seconds=1e-6,
    host_wait_seconds=0.5,
    transfer_seconds=1e-6,
    reserved_gb=1.0,
    fragmentation=0.1,
)
HARDWARE = Hardware(
    gpu="none",
    bf16_tflops=1,
    memory_gb=80,
    memory_tb_per_second=0.1,
    nvlink_gb_per_second=10,
    network_gbit_per_second=32,
    gpus_per_node=4,
    dollars_per_gpu_hour=2.0,
    assumed=ASSUMED,
)


def kernels(part: str = "moe", flops: int = 0, size: int = 0, number: int = 1) -> Kernels:
    return Kernels(part, "forward", "mm", "2x2", number, flops, size)


def transfers(kind: str, ranks: list[int], size: int, group: str = "TENSOR_MODEL_PARALLEL_GROUP") -> Transfers:
    return Transfers(group, ranks, kind, "float32", size // 4, size, 1)


@pytest.mark.parametrize(
    ("one", "seconds"),
    [
        (kernels(flops=10**12, size=10**10), 1.0),
        (kernels(flops=10**12, size=2 * 10**11), 2.0),
        (kernels("attention scores", flops=10**12), 2.0),
        (kernels(size=1), 1e-6),
    ],
)
def test_a_kernel_takes_as_long_as_its_flops_or_its_bytes(one: Kernels, seconds: float) -> None:
    assert kernel_seconds(one, HARDWARE) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("one", "seconds"),
    [
        (transfers("all_reduce", [0, 1, 2, 3], 10**10), 2 * 3 / 4),
        (transfers("all_gather_into_tensor", [0, 1], 10**10), 1.0),
        (transfers("reduce_scatter_tensor", [0, 1], 10**10), 0.5),
        (transfers("all_to_all_single", [0, 1, 2, 3], 10**10), 0.75),
        (transfers("send", [0, 1], 10**10), 1.0),
        (transfers("send", [0, 4], 10**9), 1.0),
        (transfers("all_reduce", [0, 4], 10**9), 1.0),
        (transfers("all_reduce", [0, 1], 4), 1e-6),
    ],
)
def test_a_transfer_takes_as_long_as_its_slowest_link(one: Transfers, seconds: float) -> None:
    assert transfer_seconds(one, HARDWARE) == pytest.approx(seconds)


def test_ranks_of_a_node_share_its_network() -> None:
    assert link(transfers("all_reduce", [0, 1, 4, 5], 4), HARDWARE) == pytest.approx(2.0)
    assert link(transfers("send", [0, 4], 4), HARDWARE) == pytest.approx(1.0)


def rehearsal(run: Run, micro_batches: int = 4, **more: Any) -> Rehearsal:
    memory = Memory({}, peak={"weights": 10**9, "activations": 10**9}, peak_in_update={"weights": 10**9})
    plain = Rehearsal(0, 2, "gpu", {}, micro_batches, 1, 1.0, memory, [kernels(flops=10**12, number=8)], [], {})
    return replace(plain, **more)


def test_a_step_and_a_run() -> None:
    run = Run.model_validate(run_tree(parallel={"pipeline": 2}))
    layout = resolve_layout(run, 2)
    stages = [rehearsal(run), rehearsal(run, kernels=[kernels(flops=10**12, number=4)], host_waits={"here": 1})]
    found = estimate(run, layout, HARDWARE, stages)
    assert [stage.busy for stage in found.stages] == [8.0, 4.5]
    assert layout.micro_batches == 4
    assert found.step_seconds == pytest.approx(8 + 8 / 4)  # one more micro-batch fills and drains the pipeline
    assert found.bubble == pytest.approx(0.2)
    assert found.tokens_per_second == pytest.approx(run.batch.global_tokens / 10)
    flops = step_flops(run.model, run.batch.sequence_length, run.batch.global_tokens)
    assert found.mfu == pytest.approx(flops.weights_only / 10 / 2e12)
    assert found.mfu_with_attention == pytest.approx(flops.with_attention / 10 / 2e12)
    assert found.dollars == pytest.approx(layout.steps * 10 / 3600 * 2 * 2.0)
    assert found.days == pytest.approx(layout.steps * 10 / 86400)


@pytest.mark.parametrize(("overlaps", "exposed"), [(False, 4.0), (True, 2.0)])
def test_gradients_are_reduced_beside_the_last_micro_batch(overlaps: bool, exposed: float) -> None:
    run = Run.model_validate(run_tree(parallel={"overlap_grad_reduce": overlaps}))
    sent = [transfers("reduce_scatter_tensor", [0, 1], 8 * 10**10, "DATA_PARALLEL_GROUP_WITH_CP")]
    found = stage_time(run, HARDWARE, rehearsal(run, transfers=sent))
    assert sum(found.transfers.values()) == pytest.approx(exposed)  # 4 seconds, beside 8 / 4
    assert found.hidden_transfers == pytest.approx(4.0 - exposed)


def test_bytes_that_a_gpu_needs() -> None:
    run = Run.model_validate(run_tree())
    assert bytes_needed(HARDWARE, rehearsal(run)) == pytest.approx(2.2e9 + 1e9)
