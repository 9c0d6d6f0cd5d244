"""The same seed gives the same bits of every weight in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.oracle import initial_weights
from tests.parallel.test_equal_to_one_process import run_tree


@pytest.mark.parametrize(
    ("ranks", "parallel", "precision"),
    [
        pytest.param(
            4,
            {"tensor": 2, "expert_tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
            "bf16",
            id="tp2 etp2 pp2 vpp2",
        ),
        pytest.param(2, {"expert": 2, "attention_experts": "sharded"}, "fp32", id="ep2"),
        pytest.param(4, {"tensor": 2, "pipeline": 2, "expert": 2}, "fp32", id="tp2 pp2 ep2"),
    ],
)
def test_bit_identical(ranks: int, parallel: dict[str, Any], precision: str) -> None:
    truth = initial_weights(run_tree(precision=precision), 1)
    split = initial_weights(run_tree(parallel=parallel, precision=precision), ranks)
    assert split.keys() == truth.keys()
    for name, weight in truth.items():
        assert torch.equal(split[name], weight), name
