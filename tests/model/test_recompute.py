"""`recompute: selective` frees the experts' activation until the backward pass, and changes no bit of a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.model.config import transformer_config
from jetmoe_megatron.model.experts.glu import GLUExperts
from jetmoe_megatron.model.experts.recompute import Recomputed
from tests.support import small_run

COUNTS = [70, 0, 3, 0]  # rows of each expert: of a backend that splits them, the empty part is a view too
FFN = 48


class Storages(TorchDispatchMode):
    """What the operations make, and how much of it is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: tuple = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made.append((StorageWeakRef(storage), storage.size()))
        return result

    def bytes_left(self) -> int:
        return sum({ref.cdata: size for ref, size in self.made if not ref.expired()}.values())


def experts(recompute: str, backend: str, precision: str) -> GLUExperts:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    tree = small_run(Path("unused"), {"code": "unused", "prose": "unused"}, model__expert_backend=backend)
    run = Run.model_validate({**tree, "precision": precision, "recompute": recompute})
    module = GLUExperts(4, transformer_config(run, resolve_layout(run, 1)), get_default_pg_collection())
    generator = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        weight.data.normal_(generator=generator)
    return module


def forward_and_backward(module: GLUExperts, counts: list[int]) -> tuple[int, list[Tensor]]:
    """The bytes that the forward pass keeps for the backward pass, and what both compute."""
    generator = torch.Generator().manual_seed(2)
    dtype = module.linear_in.weight.dtype
    x = torch.randn(sum(counts), 32, dtype=dtype, generator=generator).requires_grad_()
    gates = torch.rand(sum(counts), dtype=dtype, generator=generator).requires_grad_()
    with Storages() as storages:
        y, _ = module(x, torch.tensor(counts), gates)
    kept = storages.bytes_left()
    y.backward(torch.randn(y.shape, dtype=dtype, generator=generator))
    gradients = [tensor.grad for tensor in (x, gates, module.linear_in.weight, module.linear_out.weight)]
    return kept, [y.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize(
    ("backend", "precision"), [("loop", "fp32"), ("loop", "bf16"), ("torch", "fp32"), ("torch", "bf16")]
)
def test_same_gradients_without_the_activation(backend: str, precision: str, world_of_one: None) -> None:
    kept, expected = forward_and_backward(experts("none", backend, precision), COUNTS)
    less, computed = forward_and_backward(experts("selective", backend, precision), COUNTS)
    assert kept - less == sum(COUNTS) * FFN * computed[0].element_size()
    assert len(computed) == len(expected) == 5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(computed, expected, strict=True))


@pytest.mark.parametrize("backend", ["loop", "torch"])
def test_no_rows_at_all(backend: str, world_of_one: None) -> None:
    _, computed = forward_and_backward(experts("selective", backend, "fp32"), [0, 0, 0, 0])
    assert len(computed) == 5 and not any(tensor.any() for tensor in computed)


def test_computed_again_once_and_freed_after_its_last_use() -> None:
    """However many parts of it are saved, and in each backward pass."""
    calls: list[StorageWeakRef] = []

    def doubled(x: Tensor) -> Tensor:
        y = x * 2
        calls.append(StorageWeakRef(y.untyped_storage()))
        return y

    x, w = torch.randn(6, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    y = doubled(x)
    with Recomputed(doubled, x, y).hooks():
        parts = [part @ w for part in y.split([2, 0, 4])]
    del y
    assert [ref.expired() for ref in calls] == [True]
    total = torch.cat(parts).sum()
    total.backward(retain_graph=True)
    assert [ref.expired() for ref in calls] == [True, True]
    once = w.grad.clone()  # type: ignore[union-attr]
    total.backward()
    assert [ref.expired() for ref in calls] == [True, True, True]
    torch.testing.assert_close(w.grad, 2 * once)
    torch.testing.assert_close(once, (x.detach() * 2).sum(0)[:, None].expand(3, 3))
