"""How often the host waits for the GPU: never in a layer with torch's grouped matmul, and equally often in any step."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from benchmarks.contestants import our_step, run_of
from jetmoe_megatron.model.experts.choose_backend import _missing
from tests.model.test_parity import build
from tests.training.test_step import SHAPE, no_loss_scale

__all__ = ["no_loss_scale"]  # a fixture

# Once for each kind of experts: they want the counts on the host.
WAITS = {"torch": 0, "te": 2, "megablocks": 2}


@pytest.mark.parametrize("name", WAITS)
def test_waits_of_a_layer(name: str, data: dict, world_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "torch" and (reason := _missing(name)):
        pytest.skip(reason)
    # The precision is bf16, as a backend other than torch wants it.
    monkeypatch.setattr("tests.model.test_parity.small_run", in_bf16)
    _, model = build({}, data, name)
    layer = model.decoder.layers[0].train()
    angles = model.rotary_pos_emb(32)
    x = torch.randn(32, 2, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    def forward_and_backward() -> None:
        y, _ = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)
        y.backward(torch.ones_like(y))

    found = waits(forward_and_backward)
    assert len(found) == WAITS[name], found


def test_waits_of_a_step_do_not_grow(no_loss_scale: None) -> None:
    """They are for the gradient norm and for the numbers of the step, whatever the layers and micro-batches."""
    few, many = (
        waits(our_step(run_of({**SHAPE, "num_layers": layers}, "bf16", 32, sequences=2), micro_batches))
        for layers, micro_batches in ((1, 1), (3, 4))
    )
    assert len(few) == len(many) <= 10, (few, many)


def waits(function: Callable[[], object]) -> list[str]:
    """What torch says of each, after two calls that compile and warm up."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}: {w.message}" for w in caught if "synchroniz" in str(w.message)]


def in_bf16(*arguments: object, **changes: object) -> dict:
    from tests.support import small_run

    return {**small_run(*arguments, **changes), "precision": "bf16"}  # type: ignore[arg-type]
