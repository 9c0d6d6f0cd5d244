"""How often a layer makes the host wait for the GPU, counted: never with torch's grouped matmul."""

from __future__ import annotations

import warnings

import pytest
import torch

from jetmoe_megatron.model.experts.choose import _missing
from tests.model.test_parity import build

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
    layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0].sum().backward()  # compiles and warms up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) == WAITS[name], waits


def in_bf16(*arguments: object, **changes: object) -> dict:
    from tests.support import small_run

    return {**small_run(*arguments, **changes), "precision": "bf16"}  # type: ignore[arg-type]
