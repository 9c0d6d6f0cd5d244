"""Where the time of a step goes: the profiler's kernels, summed by purpose."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# A kernel (on the CPU, an operator) belongs to the first group whose pattern matches its name.
GROUPS = {
    "attention": r"flash|fmha|sdpa|attention|softmax_fwd|aten::(bmm|_softmax)",  # the last are ours on a CPU
    "grouped matmul": r"grouped|gmm|GroupProblemShape",
    "matmul": r"gemm|nvjet|cutlass|cublas|aten::(mm|addmm)|splitK",
    "gather and scatter": r"index|gather|scatter|_padded_copy|permute|sort|radix|searchsorted|scan",
    "optimizer and gradient norm": r"adam|multi_tensor|l2norm|lpnorm|foreach",
    "norm": r"rms_?norm|layer_?norm",
    "fused elementwise": r"triton_",
    "memory": r"memcpy|memset|fill|copy|zero",
    "communication": r"nccl",
    "elementwise and reductions": r"elementwise|reduce|vectorized|aten::(mul|add|sum|div|cat|silu|neg|sub|exp|log)",
}


def breakdown(step: Callable[[], Any]) -> list[tuple[str, float]]:
    """(group, milliseconds) of one step, the longest first; what matches nothing is `other`."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total[group_of(event.key)] += microseconds / 1e3
    return sorted(total.items(), key=lambda pair: -pair[1])


def group_of(kernel: str) -> str:
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")
