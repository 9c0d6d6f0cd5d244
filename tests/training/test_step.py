"""How often a step makes the host wait does not grow with layers and micro-batches, as far as a CPU shows it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contestants import our_step, run_of
from jetmoe_megatron.training.gradient_clipping import _l2_norm

SHAPE = {"hidden_size": 32, "num_kv_heads": 2, "kv_channels": 8, "ffn_hidden_size": 48, "vocab_size": 64}
ATEN = torch.ops.aten
# On a GPU the host must have the value, or the size of the result, before it can go on.
WAITING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.repeat_interleave}


class Waits(TorchDispatchMode):
    """Counts what of a step makes the host wait, outside of kernels."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: tuple = (), named: Any = None) -> Any:
        self.count += operation.overloadpacket in WAITING
        return operation(*arguments, **(named or {}))


def waits(layers: int, micro_batches: int) -> int:
    step = our_step(run_of({**SHAPE, "num_layers": layers}, "bf16", 32, sequences=2), micro_batches)
    step()
    with Waits() as found:
        step()
    return found.count


@pytest.fixture
def no_loss_scale(world_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass outside of a step leaves one of another shape behind (moe_utils.py, `MoEAuxLossAutoScaler`)."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)


def test_waits_do_not_grow(no_loss_scale: None) -> None:
    """For the gradient norm, whatever the layers; that of the step's numbers is in no operation."""
    assert waits(layers=1, micro_batches=1) == waits(layers=3, micro_batches=4) == 1


def test_the_gradient_norm_of_many_weights() -> None:
    """torch's own is wrong by 5e-4 here, and by another amount for each way to split the weights."""
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in (12_000_000, 1, 77_777)]
    norm, _ = _l2_norm(0, torch.zeros(1), [gradients], False)
    assert norm.item() == pytest.approx(torch.cat(gradients).double().norm().item(), rel=2e-6)


def test_a_step_without_a_loss_is_no_number() -> None:
    """As `data.mask_loss` leaves one that holds ends of documents alone: the guard judges it."""
    from jetmoe_megatron.training.metrics import _mean_loss

    assert _mean_loss({"loss_sum": 6.0, "tokens": 3.0}) == 2.0
    assert math.isnan(_mean_loss({"loss_sum": 0.0, "tokens": 0.0}))
