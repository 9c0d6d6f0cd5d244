"""Documents that share a sequence and are kept apart give the same as each document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from tests.model.test_parity import hugging_face_twin
from tests.support import VOCAB, small_run

LENGTHS = (9, 1, 14, 8)
EOD = 2


def model_of(data: dict[str, str], **options: bool) -> tuple[Run, Any]:
    from jetmoe_megatron.model.build import build_model

    changes = {f"data__{key}": value for key, value in options.items()}
    # The balance loss looks at all tokens of a micro-batch together: it is not the sum over documents.
    losses = {"balance": 0.0, "z": 0.0}
    run = Run.model_validate(small_run(Path("unused"), data, model__init_std=0.2, losses=losses, **changes))
    (model,) = build_model(run, resolve_layout(run, 1))
    return run, model


def documents() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.cat([torch.randint(3, VOCAB, (n,), generator=random), torch.tensor([EOD])]) for n in LENGTHS]


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and labels [1, S], the loss mask as `data.mask_loss` has it."""
    text = torch.cat(documents())
    tokens, labels = text[None, :-1], text[None, 1:]
    return tokens, labels, tokens != EOD


@pytest.mark.parametrize("reset_positions", [True, False])
def test_equal_to_each_document_alone(data: dict, world_of_one: None, reset_positions: bool) -> None:
    """Losses and gradients. Rotary attention sees differences of positions only: the mask alone is enough."""
    from jetmoe_megatron.data.documents import document_of_tokens
    from jetmoe_megatron.training.step import _hidden

    _, model = model_of(data, mask_attention=True, reset_positions=reset_positions, mask_loss=True)
    tokens, labels, counted = packed()
    positions = torch.cat([torch.arange(len(d)) for d in documents()])[None, :-1]
    mask = _hidden(document_of_tokens(tokens[0], EOD)[None])
    losses = model(tokens, positions, mask, labels=labels)[counted]
    losses.sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    apart = [
        model(text[None, :-1], torch.arange(len(text) - 1)[None], None, labels=text[None, 1:])[0]
        for text in documents()
        if len(text) > 1
    ]
    torch.cat(apart).sum().backward()
    torch.testing.assert_close(losses, torch.cat(apart), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (together[name] - parameter.grad).abs().max() <= 1e-5 * scale, name


def test_positions_alone_equal_hugging_face(data: dict, world_of_one: None) -> None:
    run, model = model_of(data, reset_positions=True)
    tokens, *_ = packed()
    both = tokens.repeat(2, 1)
    positions = torch.stack(
        [torch.cat([torch.arange(len(d)) for d in documents()])[:-1], torch.arange(tokens.shape[1])]
    )
    with torch.no_grad():
        ours = model(both, positions, None)
        theirs = hugging_face_twin(run, model)(both, position_ids=positions).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours[0, -1] - ours[1, -1]).abs().max() > 1e-3  # the positions do matter
