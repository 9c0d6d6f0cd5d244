"""Times from rates, with rehearsals that are made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from jetmoe_megatron.config.flops import step_flops
from jetmoe_megatron.config.hardware import Assumed, Hardware
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.estimate import bytes_needed, estimate, kernel_seconds, stage_time, transfer_seconds
from jetmoe_megatron.plan.rehearsal import Kernels, Memory, Rehearsal, Transfers, Waits
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
    fp32_tflops=1,
    memory_gb=80,
    memory_tb_per_second=0.1,
    nvlink_gb_per_second=10,
    network_gbit_per_second=32,
    gpus_per_node=4,
    dollars_per_gpu_hour=2.0,
    assumed=ASSUMED,
)


def kernels(
    part: str = "moe", flops: int = 0, size: int = 0, number: int = 1, direction: str = "forward", chunk: int = 0
) -> Kernels:
    return Kernels(part, direction, chunk, "mm", "2x2", number, flops, size)


def transfers(
    kind: str,
    ranks: list[int],
    size: int,
    group: str = "TENSOR_MODEL_PARALLEL_GROUP",
    direction: str = "forward",
    number: int = 1,
) -> Transfers:
    return Transfers(direction, 0, group, ranks, kind, "float32", size // 4, size, number)


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
    assert kernel_seconds(one, HARDWARE, "bf16") == pytest.approx(seconds)


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
        (transfers("all_reduce", [0, 1, 4, 5], 10**9), 2 * 3 / 4 / 2),  # two GPUs' shares of the network
        (transfers("all_reduce", [0, 1, 2, 4], 10**9), 2 * 3 / 4),  # one: the second node has no more in the group
        # Each rank sends to each other itself: half, and at worst three quarters, goes over its share of the network.
        (transfers("all_to_all_single", [0, 1, 4, 5], 10**9), 1 / 2),
        (transfers("all_to_all_single", [0, 1, 2, 4], 10**9), 3 / 4),
        (transfers("all_reduce", [0, 1], 4), 1e-6),
    ],
)
def test_a_transfer_takes_as_long_as_its_slowest_link(one: Transfers, seconds: float) -> None:
    assert transfer_seconds(one, HARDWARE) == pytest.approx(seconds)


def test_fp32_has_its_own_peak() -> None:
    one = kernels(flops=10**12, size=10**10)
    gpu = HARDWARE.model_copy(update={"fp32_tflops": 0.5})
    assert kernel_seconds(one, gpu, "fp32") == pytest.approx(2.0)
    times = [
        stage_time(Run.model_validate(run_tree(precision=precision)), gpu, rehearsal()).busy
        for precision in ("fp32", "bf16")
    ]
    assert times == [24.0, 12.0]


def rehearsal(stage: int = 0, rank: int = 0, **more: Any) -> Rehearsal:
    """Of four micro-batches: a forward pass takes a second and a backward pass two."""
    most = {"weights": 10**9, "activations": 10**9}
    memory = Memory({}, peak=most, peak_in_update={"weights": 10**9}, peak_in_save={"weights": 10**9})
    work = [kernels(flops=10**12, number=4), kernels(flops=2 * 10**12, number=4, direction="backward")]
    plain = Rehearsal(rank, 2, "gpu", {"pipeline": stage}, 4, 1, 1.0, memory, work, [], [])
    return replace(plain, **more)


def test_a_step_and_a_run() -> None:
    run = Run.model_validate(run_tree(parallel={"pipeline": 2}, batch__micro_sequences=1))
    layout = resolve_layout(run, 2)
    assert layout.micro_batches == 8
    found = estimate(run, layout, HARDWARE, [rehearsal(micro_batches=8), rehearsal(1, 1, micro_batches=8)])
    assert [stage.busy for stage in found.stages] == [12.0, 12.0]
    assert found.step_seconds == pytest.approx(13.5)  # one more micro-batch fills and drains the pipeline
    assert found.bubble == pytest.approx(1 / 9)
    assert found.tokens_per_second == pytest.approx(run.batch.global_tokens / 13.5)
    flops = step_flops(run.model, run.batch.sequence_length, run.batch.global_tokens)
    assert found.mfu == pytest.approx(flops.weights_only / 13.5 / 2e12)
    assert found.mfu_with_attention == pytest.approx(flops.with_attention / 13.5 / 2e12)
    assert found.dollars == pytest.approx(layout.steps * 13.5 / 3600 * 2 * 2.0)
    assert found.days == pytest.approx(layout.steps * 13.5 / 86400)


def test_what_a_pass_takes() -> None:
    run = Run.model_validate(run_tree(parallel={"pipeline": 2, "virtual_pipeline": 2}))
    work = [
        kernels(flops=10**12, number=4),
        kernels("attention scores", flops=10**12, number=4, chunk=1),
        kernels(flops=10**12, number=8, direction="backward", chunk=1),
        kernels(flops=10**12, number=4, direction="recompute", chunk=1),
        kernels("optimizer", flops=10**12, number=3, direction="update"),
        kernels(flops=10**12, direction="reduction"),
    ]
    sent = [
        transfers("all_reduce", [0, 1], 10**10, number=4),
        transfers("all_reduce", [0, 1], 10**10, "EMBEDDING_GROUP", "reduction"),
        transfers("send", [0, 1], 10**9, "PIPELINE_MODEL_PARALLEL_GROUP", "message", number=4),
    ]
    waits = [Waits("backward", 0, "here", 8)]
    found = stage_time(run, HARDWARE, rehearsal(kernels=work, transfers=sent, host_waits=waits))
    seconds = found.seconds
    assert seconds.forward == pytest.approx([2.0, 2.0])  # the first chunk with a second for its collective
    assert seconds.backward == pytest.approx([1.0, 2.0])  # the first chunk waits twice
    assert seconds.recompute == pytest.approx([0.0, 1.0])
    assert (seconds.reduction, seconds.update, seconds.message) == pytest.approx((2.0, 3.0, 0.1))
    in_passes = 4 * sum(seconds.forward + seconds.backward + seconds.recompute)
    assert found.busy == pytest.approx(in_passes + seconds.reduction + seconds.update)


def test_a_message_goes_to_the_rank_of_the_next_stage() -> None:
    """Not to the whole group, of which some are on other nodes. The last stage sends to that before."""
    run = Run.model_validate(run_tree(parallel={"pipeline": 4}))
    sent = [transfers("send", [0, 2, 4, 6], 10**9, "PIPELINE_MODEL_PARALLEL_GROUP", "message")]
    for rank, seconds in ((0, 0.1), (2, 1.0), (4, 0.1), (6, 0.1)):
        found = stage_time(run, HARDWARE, rehearsal(rank=rank, world=8, transfers=sent))
        assert found.seconds.message == pytest.approx(seconds)


def test_the_slowest_rank_of_a_stage_counts() -> None:
    run = Run.model_validate(run_tree(parallel={"pipeline": 2}))
    layout = resolve_layout(run, 4)
    slow = [kernels(flops=10**13, number=4), kernels(direction="backward")]
    one = estimate(run, layout, HARDWARE, [rehearsal(), rehearsal(1, 2, kernels=slow)])
    more = estimate(
        run, layout, HARDWARE, [rehearsal(), rehearsal(0, 1), rehearsal(1, 2, kernels=slow), rehearsal(1, 3)]
    )
    assert len(more.stages) == 4
    assert more.timeline == one.timeline


def test_stages_that_were_not_rehearsed_are_like_that_before() -> None:
    run = Run.model_validate(run_tree(parallel={"pipeline": 4}, batch__micro_sequences=1))
    layout = resolve_layout(run, 4)
    middle, last = [kernels(flops=2 * 10**12, number=8)], [kernels(flops=3 * 10**12, number=8)]
    some = [rehearsal(), rehearsal(1, 1, kernels=middle), rehearsal(3, 3, kernels=last)]
    every = [some[0], some[1], rehearsal(2, 2, kernels=middle), some[2]]
    found, expected = (estimate(run, layout, HARDWARE, world) for world in (some, every))
    assert found.step_seconds == expected.step_seconds
    assert found.timeline == expected.timeline
    assert len(found.stages) == 3


@pytest.mark.parametrize(("overlaps", "exposed", "step"), [(False, 4.0, 16.0), (True, 2.0, 14.0)])
def test_gradients_are_reduced_beside_the_last_backward_pass(overlaps: bool, exposed: float, step: float) -> None:
    run = Run.model_validate(run_tree(parallel={"overlap_grad_reduce": overlaps}, batch__micro_sequences=2))
    layout = resolve_layout(run, 1)
    assert layout.micro_batches == 4
    sent = [transfers("reduce_scatter_tensor", [0, 1], 8 * 10**10, "DATA_PARALLEL_GROUP_WITH_CP", "reduction")]
    found = estimate(run, layout, HARDWARE, [rehearsal(transfers=sent)])
    (stage,) = found.stages
    assert sum(stage.transfers.values()) == pytest.approx(exposed)
    assert stage.hidden_transfers == pytest.approx(4.0 - exposed)
    assert found.step_seconds == stage.busy == pytest.approx(step)
    assert found.bubble == pytest.approx(0)


def test_the_timeline_is_not_in_the_json() -> None:
    run = Run.model_validate(run_tree())
    found = estimate(run, resolve_layout(run, 1), HARDWARE, [rehearsal()])
    assert found.timeline and "timeline" not in found.tree()
    json.dumps(found.tree())


def test_bytes_that_a_gpu_needs() -> None:
    assert bytes_needed(HARDWARE, rehearsal()) == pytest.approx(2.2e9 + 1e9)
    for moment in ("peak", "peak_in_update", "peak_in_save"):
        memory = replace(rehearsal().memory, **{moment: {"weights": 3 * 10**9}})
        assert bytes_needed(HARDWARE, rehearsal(memory=memory)) == pytest.approx(3.3e9 + 1e9)
