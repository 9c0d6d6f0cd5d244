"""What AdamW does besides following the gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from tests.support import small_run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_decay_norms_and_biases_do_not(precision: str, data: dict, world_of_one: None) -> None:
    from jetmoe_megatron.model.build import build_model
    from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel
    from jetmoe_megatron.training.step import update_weights

    tree = small_run(Path("unused"), data, precision=precision, optimizer__weight_decay=0.25)
    run = Run.model_validate(tree)
    model = wrap_for_data_parallel(run, build_model(run, resolve_layout(run, 1)))
    optimizer = build_optimizer(run, model)
    before = {name: p.detach().float().clone() for name, p in model[0].named_parameters()}
    model[0].zero_grad_buffer()
    optimizer.prepare_grads()
    update_weights(optimizer, gradient_norm=0.0, learning_rate=0.5)
    sizes = set()
    for name, parameter in model[0].named_parameters():
        sizes.add(parameter.dim())
        kept = 1.0 if parameter.dim() == 1 else 1 - 0.5 * 0.25
        torch.testing.assert_close(parameter.detach().float(), before[name] * kept, rtol=1e-2, atol=0, msg=name)
    assert len(sizes) > 1
