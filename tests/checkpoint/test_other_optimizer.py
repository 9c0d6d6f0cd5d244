"""The optimizers of Transformer Engine and Apex load the state of torch's AdamW, and the reverse.

Those run on a GPU only, but their checkpoints can be read on a CPU. A stand-in keeps its state as they do: no moments
before the first step, and one count of steps per group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks.contestants import _build, random_batch, run_of
from jetmoe_megatron.checkpoint.optimizer_state import MOMENTS, own_numbers, set_steps, steps_done
from jetmoe_megatron.training import optimizer as training_optimizer
from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel
from jetmoe_megatron.training.step import compute_gradients, update_weights
from tests.checkpoint.test_reshard import whole_state

SHAPE = {"num_layers": 1, "hidden_size": 32, "num_kv_heads": 2, "kv_channels": 8, "ffn_hidden_size": 48}


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params: Any, adam_w_mode: bool = True, **defaults: Any) -> None:
        assert adam_w_mode
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            count = group["step"] = group.get("step", 0) + 1
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                own = self.state[p]
                m, v = (own.setdefault(kind, torch.zeros_like(p)) for kind in MOMENTS)
                m.lerp_(p.grad, 1 - b1)
                v.lerp_(p.grad**2, 1 - b2)
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(m / (1 - b1**count), (v / (1 - b2**count)).sqrt() + group["eps"], value=-lr)


@contextlib.contextmanager
def fused_adam() -> Iterator[None]:
    """Megatron as it is where Transformer Engine can be imported."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        patch.multiple(distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield


KINDS: dict[str, Callable[[], AbstractContextManager[None]]] = {"torch": contextlib.nullcontext, "fused": fused_adam}


class Training:
    def __init__(self, kind: str, precision: str, distributed: bool) -> None:
        self.kind = KINDS[kind]
        parallel = {"distributed_optimizer": distributed}
        run = run_of({**SHAPE, "vocab_size": 64}, precision, 32, sequences=2, parallel=parallel)
        # one rank has nobody to distribute it over, but it is what keeps the state here
        with self.kind(), patch.object(training_optimizer, "is_distributed", lambda run: distributed):
            self.model = wrap_for_data_parallel(run, _build(run))
            self.optimizer = build_optimizer(run, self.model)
        assert isinstance(self.optimizer.chained_optimizers[0].optimizer, FusedAdam) == (kind == "fused")
        self.batch = random_batch(run)

    def step(self) -> None:
        with self.kind():
            _, norm = compute_gradients(self.model, self.optimizer, [self.batch])
            update_weights(self.optimizer, norm, 1e-2)

    def state(self) -> tuple[list[dict[str, torch.Tensor]], int]:
        with self.kind():
            state = whole_state(self.optimizer)
        return [
            {"weight": p.data.clone(), **{kind: tensor.clone() for kind, tensor in state[p].items()}}
            for p in self.model[0].parameters()
        ], steps_done(self.optimizer)

    def take_over(self, states: list[dict[str, torch.Tensor]], steps: int) -> None:
        parameters = list(self.model[0].parameters())
        for parameter, state in zip(parameters, states, strict=True):
            parameter.data.copy_(state.pop("weight"))
        with self.kind():
            self.optimizer.reload_model_params()
            state_of = dict(zip(parameters, states, strict=True))
            for own in own_numbers(self.optimizer):
                own.numbers_N.copy_(state_of[own.parameter][own.kind].flatten()[own.first :][: len(own.numbers_N)])
            set_steps(self.optimizer, steps)


@pytest.fixture(autouse=True)
def no_loss_scale(world_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("first", "then"), [("torch", "fused"), ("fused", "torch")])
def test_taken_over(first: str, then: str, precision: str, distributed: bool) -> None:
    one, other = (Training(kind, precision, distributed) for kind in (first, then))
    for _ in range(3):
        one.step()
    other.take_over(*one.state())
    assert equal(other.state(), one.state(), tolerance=0)
    one.step()
    other.step()
    assert equal(other.state(), one.state(), tolerance=1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("distributed", [True, False])
def test_saved_before_the_first_step(distributed: bool) -> None:
    """As when the first step was bad and is skipped: what is allocated then must not stay as memory was."""
    training = Training("fused", "bf16", distributed)
    torch.use_deterministic_algorithms(True)  # memory that is allocated and not filled is NaN then
    try:
        states, steps = training.state()
    finally:
        torch.use_deterministic_algorithms(False)
    assert steps == 0
    assert not any(state[kind].any() for state in states for kind in MOMENTS)


def equal(ours: tuple[list, int], theirs: tuple[list, int], tolerance: float) -> bool:
    assert ours[1] == theirs[1]
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert one.keys() == other.keys()
        for kind, tensor in one.items():
            difference = (tensor.float() - other[kind].float()).abs().max()
            assert difference <= tolerance * other[kind].float().abs().max(), kind
    return True
