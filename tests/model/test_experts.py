"""Every backend against the loop, and the loop against one dense matmul per row."""

from __future__ import annotations

import pytest
import torch

from jetmoe_megatron.config import Model
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.model.experts import BACKENDS, resolve_backend

COUNTS = {"uneven": [3, 0, 11, 1, 0], "even": [4, 4, 4, 4, 4], "one": [0, 0, 9, 0, 0], "none": [0, 0, 0, 0, 0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_linear(backend: str, counts: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True)
    w = torch.randn(5, 24, 16, dtype=dtype, requires_grad=True)
    y = BACKENDS[backend](x, w, torch.tensor(counts))
    y.backward(torch.ones_like(y))
    expert_of_row = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    x2, w2 = (t.detach().float().requires_grad_() for t in (x, w))
    y2 = torch.einsum("nd,nfd->nf", x2, w2[expert_of_row])
    y2.backward(torch.ones_like(y2))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, truth in ((y, y2), (x.grad, x2.grad), (w.grad, w2.grad)):
        torch.testing.assert_close(ours.float(), truth, **tolerance)


def shape(**changes: object) -> Model:
    tree = dict(num_layers=1, hidden_size=32, num_kv_heads=2, kv_channels=8, ffn_hidden_size=48, vocab_size=64)
    return Model.model_validate({**tree, **changes})


def test_auto_takes_torch_where_its_kernel_can_serve() -> None:
    assert resolve_backend(shape(), "fp32") == "torch"
    assert resolve_backend(shape(ffn_hidden_size=50), "fp32") == "loop"
    assert resolve_backend(shape(ffn_hidden_size=52), "fp32") == "torch"
    assert resolve_backend(shape(ffn_hidden_size=52), "bf16") == "loop"
    assert resolve_backend(shape(expert_backend="loop"), "fp32") == "loop"


def test_a_backend_asked_for_by_name_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"expert_backend: torch needs .* 8 in bf16; ffn_hidden_size \(52\)"):
        resolve_backend(shape(expert_backend="torch", ffn_hidden_size=52), "bf16")
