"""What the start says about the attention kernel is what a layer calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.model.attention import scaled_dot_product
from jetmoe_megatron.model.attention_kernel import attention_kernel
from jetmoe_megatron.runtime.device import has_gpu
from tests.support import pretrain, small_run, write_run


@pytest.mark.skipif(has_gpu(), reason="there is a GPU, and these are the kernels of a CPU")
@pytest.mark.parametrize(
    ("length", "masked", "said", "called"),
    [
        (32, False, "ours for a CPU", "_CausalAttention"),
        (4096, False, "torch's flash kernel", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        (32, True, "torch's flash kernel", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_it_is_the_one_that_is_called(length: int, masked: bool, said: str, called: str) -> None:
    changes: dict[str, Any] = {"batch": {"sequence_length": length, "global_tokens": length}, "precision": "bf16"}
    if masked:
        changes |= {"data__mask_attention": True, "tokenizer": "x"}
    run = Run.model_validate(small_run(Path("x"), {"code": "c", "prose": "p"}, **changes))
    assert attention_kernel(run, resolve_layout(run, 1)) == said
    q, k = (torch.randn(length, 1, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1) if masked else None
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        scaled_dot_product(q, k, k, mask)
    assert called in {event.key for event in profiled.key_averages()}


def test_a_start_says_it_once(tmp_path: Path, data: dict[str, str]) -> None:
    started = pretrain(2, write_run(tmp_path, small_run(tmp_path, data)), "debug.max_steps=1")
    assert started.returncode == 0, started.stderr
    assert len([line for line in started.stdout.splitlines() if line.startswith("attention: ")]) == 1
    assert len([line for line in started.stdout.splitlines() if line.startswith("each rank has: device ")]) == 1
