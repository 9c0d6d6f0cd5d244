"""The time of each part, from traces that are written by hand: each time is known."""

from __future__ import annotations

from typing import Any

import pytest

from jetmoe_megatron.training import profile_table as parts
from jetmoe_megatron.training.profile_table import Place, times_of

MAIN, ENGINE, STREAM = 1, 2, 7  # threads of the host, and of the GPU
Event = dict[str, Any]


def event(
    name: str, begin: float, end: float, tid: int = MAIN, cat: str = "cpu_op", args: dict[str, int] | None = None
) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": begin, "dur": end - begin, "args": args or {}}


def ranged(name: str, begin: float, end: float, tid: int = MAIN) -> Event:
    return event(name, begin, end, tid, "user_annotation")


def backward(name: str, begin: float, end: float, number: int, tid: int = MAIN) -> list[Event]:
    found = {"Sequence number": number, "Fwd thread id": 1}
    around = event(f"autograd::engine::evaluate_function: {name}", begin, end, tid, args=found)
    return [around, event(name, begin + 1, end - 1, tid, args=found)]


def arrow(number: int, begin: float, end: float, tid: int = MAIN) -> list[Event]:
    both = {"cat": "fwdbwd", "name": "fwdbwd", "id": number}
    return [{"ph": "s", "tid": MAIN, "ts": begin, **both}, {"ph": "f", "tid": tid, "ts": end, **both}]


def kernel(name: str, begin: float, end: float, launch: int, stream: int = STREAM) -> Event:
    return event(name, begin, end, stream, "kernel", {"correlation": launch})


def launch(number: int, at: float, tid: int = MAIN) -> Event:
    return event("cudaLaunchKernel", at, at + 1, tid, "cuda_runtime", {"correlation": number})


def of(*events: Event) -> dict[Place, float]:
    """Microseconds of each part, which must add up to the steps'."""
    times = times_of({"traceEvents": list(events)})
    assert sum(times.of.values()) == pytest.approx(times.whole)
    return {place: micros for place, micros in times.of.items() if micros}


def test_a_moment_belongs_to_the_innermost_part() -> None:
    found = of(
        ranged(f"{parts.STEP}3", 0, 100),
        ranged(parts.MOA, 10, 60),
        event("aten::mm", 12, 20),
        ranged(parts.MOA_ROUTER, 20, 35),
        ranged("a name of somebody else's", 36, 90),  # ends after the part in which it begins
        ranged(parts.OPTIMIZER, 60, 80),
        event("aten::add", 5, 95, tid=ENGINE),
    )
    assert found == {
        (parts.MOA, False): 35,
        (parts.MOA_ROUTER, False): 15,
        (parts.OPTIMIZER, False): 20,
        (parts.REST, False): 30,
    }


def test_the_backward_pass_belongs_to_its_forward_operation() -> None:
    """The second operation has no arrow, the third one is computed again in the backward pass."""
    found = of(
        ranged(f"{parts.STEP}1", 0, 100),
        ranged(parts.NORMS, 0, 20),
        event("aten::rms_norm", 5, 15, args={"Sequence number": 4, "Fwd thread id": 0}),
        *backward("RmsNormBackward", 30, 45, number=4),
        *arrow(9, 5, 31),
        *backward("OtherBackward", 50, 60, number=99),
        event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 60, 70),
        event("c10d::allreduce_", 66, 69),
        *backward("CheckpointFunctionBackward", 70, 90, number=98),
        ranged(parts.MOE_EXPERTS, 72, 85),
    )
    assert found == {
        (parts.NORMS, False): 20,
        (parts.NORMS, True): 15,
        (parts.ACCUMULATION, True): 7,
        (parts.REDUCTIONS, True): 3,
        (parts.MOE_EXPERTS, True): 13,
        (parts.REST, True): 10 + 7,
        (parts.REST, False): 25,
    }


def test_only_steps_count() -> None:
    """Between two steps there is an evaluation."""
    events = [ranged(f"{parts.STEP}{step}", at, at + 10) for step, at in ((4, 0), (5, 50))]
    found = [*events, *(ranged(parts.NORMS, at, at + 4) for at in (2, 20, 52))]
    assert of(*found) == {(parts.NORMS, False): 8, (parts.REST, False): 12}
    times = times_of({"traceEvents": found})
    assert times.steps == [4, 5] and not times.on_gpu
    rows = {line[:24].strip(): line[24:].split() for line in times.table().splitlines()}
    assert rows["norms"] == ["0.004", "0.000", "0.004", "40.0%"]  # milliseconds of a step
    assert rows["rest"] == ["0.006", "60.0%"] and rows["step"] == ["0.010", "100.0%"]


def test_on_a_gpu_the_kernels_count_where_they_were_launched() -> None:
    found = of(
        ranged(f"{parts.STEP}1", 0, 100),
        ranged(parts.MOE_ROUTER, 0, 10),
        event("aten::mm", 1, 9, args={"Sequence number": 4, "Fwd thread id": 0}),
        launch(1, 3),
        kernel("gemm", 20, 30, launch=1),
        *backward("MmBackward", 12, 18, number=4, tid=ENGINE),
        *arrow(9, 1, 13, tid=ENGINE),
        launch(2, 14, tid=ENGINE),
        kernel("gemm", 30, 45, launch=2),
        launch(3, 19),
        kernel("elementwise", 90, 130, launch=3),
        kernel("of no launch", 60, 62, launch=77),
    )
    assert found == {
        (parts.MOE_ROUTER, False): 10,
        (parts.MOE_ROUTER, True): 15,
        (parts.REST, False): 12,
        (parts.IDLE, False): 20 + 15 + 28,
    }


def test_an_exchange_counts_where_nothing_else_runs() -> None:
    found = of(
        ranged(f"{parts.STEP}1", 0, 100),
        ranged(parts.MOE_DISPATCH, 0, 4),
        launch(1, 1),
        ranged(parts.MOE_EXPERTS, 5, 9),
        launch(2, 6),
        launch(3, 7),
        launch(4, 9),
        kernel("ncclDevKernel_SendRecv", 10, 50, launch=1, stream=8),
        kernel("gemm", 20, 30, launch=2),
        kernel("gemm", 25, 40, launch=3, stream=9),
        kernel("ncclDevKernel_AllReduce", 50, 100, launch=4, stream=8),
    )
    assert found == {
        (parts.MOE_DISPATCH, False): 20,
        (parts.MOE_EXPERTS, False): 20,
        (parts.REDUCTIONS, False): 50,
        (parts.IDLE, False): 10,
    }
