"""Megatron's cache of angles must not keep the model alive."""

from __future__ import annotations

import gc
import weakref

import torch

from tests.model.test_parity import build


def test_a_model_that_is_gone_leaves_nothing(data: dict, world_of_one: None) -> None:
    from jetmoe_megatron.model.rotary import forget_angles

    _, model = build({}, data)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    model(tokens, tokens, None)
    rotary = weakref.ref(model.rotary_pos_emb)
    del model
    gc.collect()
    assert rotary() is not None  # else there is no need for what is tested here
    forget_angles()
    gc.collect()
    assert rotary() is None
