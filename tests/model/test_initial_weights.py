from __future__ import annotations

import torch

from tests.model.test_parity import build


def test_weights_are_a_function_of_the_seed_and_the_name(data: dict, world_of_one: None) -> None:
    from jetmoe_megatron.model.initial_weights import initialize_weights

    _, model = build({}, data)
    first = {name: p.clone() for name, p in model.named_parameters()}
    initialize_weights(model, seed=1234, std=0.2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, first[name]), name
    initialize_weights(model, seed=1235, std=0.2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, first[name])}
    assert changed == {name for name, p in first.items() if p.dim() > 1}


def test_what_is_drawn(data: dict, world_of_one: None) -> None:
    _, model = build({"hidden_size": 128, "num_layers": 1}, data)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert abs(parameter.std() / 0.2 - 1) < 0.15, name
            assert abs(parameter.mean()) < 0.05, name
    experts = model.decoder.layers[0].mlp.experts.linear_in.weight
    assert not torch.equal(experts[0], experts[1])
