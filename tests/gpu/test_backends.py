"""Every installed backend, compared with the loop: forward and backward, with uneven and empty experts."""

from __future__ import annotations

import pytest
import torch

from jetmoe_megatron.model.experts.choose_backend import _missing
from jetmoe_megatron.model.fusion import can_fuse
from tests.model.experts_oracle import check

TOKENS = 300
# fp8 has two or three bits of mantissa: no more than a sign that the scales and the order of the rows are right.
BF16 = {"torch": 2e-2, "megablocks": 2e-2, "te": 2e-2, "te_fp8": 0.3}


@pytest.mark.parametrize("name", BF16)
def test_bf16(name: str) -> None:
    if name != "torch" and (reason := _missing(name)):
        pytest.skip(reason)
    if name == "te_fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs Hopper")
    check(name, torch.bfloat16, "cuda", TOKENS, BF16[name])


def test_fp32() -> None:
    check("torch", torch.float32, "cuda", TOKENS, 1e-4)


def test_elementwise_operations_are_fused() -> None:
    assert can_fuse()
