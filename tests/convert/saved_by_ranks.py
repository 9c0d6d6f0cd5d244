"""What the ranks of a layout save and load, for tests of the conversion."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from tests.parallel.oracle import train_step, training


def save_and_load(tree: dict[str, Any], root: str, checkpoint: str | None) -> list[tuple[str, float]]:
    """Save weights that depend on their names alone, norms and biases too, then load the same from `checkpoint`.

    Returns of each parameter of this rank the name, and how much what is loaded differs from what was saved.
    """
    from jetmoe_megatron.checkpoint.load import load_weights
    from jetmoe_megatron.checkpoint.saver import Saver
    from jetmoe_megatron.training.optimizer import build_optimizer, settle_weights

    with training(tree, 1) as (run, model, batches_of_steps):
        disturb(model)
        optimizer = build_optimizer(run, model)
        saver = Saver(Path(root), run, is_kept=lambda tokens: False)
        saver.save({"tokens": 0, "data": {}}, model, optimizer, wait=True)
        if checkpoint is None:
            return []
        named = [item for chunk in model for item in chunk.named_parameters()]
        saved = [parameter.detach().clone() for _, parameter in named]
        with torch.no_grad():
            for _, parameter in named:
                parameter.fill_(7.0)
        optimizer.reload_model_params()
        load_weights(Path(checkpoint), model, optimizer)
        # A step with a learning rate of 0 writes the optimizer's own copies of the weights over them.
        train_step(model, optimizer, next(iter(batches_of_steps)), learning_rate=0.0)
        settle_weights(model)
        return [(name, (a - b).abs().max().item()) for (name, a), b in zip(named, saved, strict=True)]


@torch.no_grad()
def disturb(model: list[Any]) -> None:
    """Ones and zeros would hide a norm or a bias that is lost or in another's place."""
    from megatron.core.utils import unwrap_model

    from jetmoe_megatron.model.initial_weights import global_named_parameters

    for chunk in unwrap_model(model):
        for name, parameter in global_named_parameters(chunk):
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
