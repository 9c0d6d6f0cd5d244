"""Matmuls in whole blocks of rows: the loop's results and gradients, and few shapes whatever the routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jetmoe_megatron.model.experts import Backend, few_shapes
from tests.model.experts_oracle import TOLERANCE, check

BACKEND = Backend(few_shapes.grouped_linear)


@pytest.mark.parametrize("tokens", [20, 300])  # less than a block for each expert, and several
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_loop(dtype: torch.dtype, tokens: int) -> None:
    check(BACKEND, dtype, "cpu", tokens)


class Shapes(TorchDispatchMode):
    """Of the matmuls: rows, inner, columns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int, int]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten.mm:
            a, b = arguments[:2]
            self.seen.add((*a.shape, b.shape[1]))
        return function(*arguments, **(more or {}))


def test_shapes_are_few() -> None:
    random = torch.Generator().manual_seed(1)
    shapes, steps = Shapes(), 20
    for _ in range(steps):
        x = torch.randn(1000, 16, requires_grad=True)
        w = torch.randn(8, 24, 16, requires_grad=True)
        counts = torch.randint(8, (1000,), generator=random).bincount(minlength=8)
        with shapes:
            BACKEND.linear(x, w, counts).sum().backward()
    # about 125 rows each, so 128 or 192; a forward matmul, and two for the gradients
    assert shapes.seen <= {shape for n in (64, 128, 192, 256) for shape in ((n, 16, 24), (n, 24, 16), (24, n, 16))}
    assert len(shapes.seen) >= 6


def test_a_row_that_is_not_finite_stays_with_its_expert_in_the_output() -> None:
    x, w = torch.ones(100, 16), torch.ones(2, 24, 16)
    x[50:] = float("nan")
    y = BACKEND.linear(x, w, torch.tensor([50, 50]))
    assert y[:50].isfinite().all() and y[50:].isnan().all()
