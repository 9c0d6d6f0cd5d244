"""Rotary positions (Su et al., arXiv 2104.09864): the rotation, and angles that start again at each document.

Letters: S sequence, B micro-batch, K slots, N heads of a slot, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from jetmoe_megatron.model.fusion import fused


def turn(x_SBKNC: Tensor, angles: Tensor) -> Tensor:
    """Rotate each head by the angles of its position, and order the heads as [N, K]: -> [S, B, N * K, C].

    angles: [S, 1 or B, 1, C] in fp32, the same in both halves of C, as Megatron's embedding gives them.
    """
    half = angles[..., : angles.shape[-1] // 2].unsqueeze(2)
    return _Turn.apply(x_SBKNC, half.cos().to(x_SBKNC.dtype), half.sin().to(x_SBKNC.dtype))


@fused
def _turned(x_SBKNC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x_SBKNC.chunk(2, dim=-1)
    y = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    return y.transpose(2, 3).flatten(2, 3)


@fused
def _turned_back(g: Tensor, cos: Tensor, sin: Tensor, slots: int) -> Tensor:
    left, right = g.unflatten(2, (-1, slots)).transpose(2, 3).chunk(2, dim=-1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBKNC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.slots = x_SBKNC.shape[2]
        return _turned(x_SBKNC, cos, sin)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _turned_back(g, *ctx.saved_tensors, ctx.slots), None, None


class PositionedRotaryEmbedding(RotaryEmbedding):
    """Megatron's embedding uses a token's place in the sequence as its position. This one uses `position_ids`."""

    position_ids_BS: Tensor

    def forward(self, max_seq_len: int, *arguments: Any, **more: Any) -> Tensor:
        """Angles [S, B, 1, C]."""
        angles_SC = super().forward(max_seq_len, *arguments, **more)[:, 0, 0]
        return angles_SC[self.position_ids_BS.t()].unsqueeze(2)


def follow_position_ids(model: GPTModel, rotary_base: float) -> None:
    """Rotate by the `position_ids` that the model is given."""
    rotary = PositionedRotaryEmbedding(
        kv_channels=model.config.kv_channels,
        rotary_percent=1.0,
        rotary_base=rotary_base,
        use_cpu_initialization=model.config.use_cpu_initialization,
    )

    preprocess = model._preprocess  # called by `forward`, and without it by the overlapped exchange of experts

    def take_positions(*arguments: Any, position_ids: Tensor, **more: Any) -> Any:
        rotary.position_ids_BS = position_ids
        return preprocess(*arguments, position_ids=position_ids, **more)

    model.rotary_pos_emb = rotary
    model._preprocess = take_positions


def forget_angles() -> None:
    """Clear Megatron's cache of angles. Call it when a model is no longer needed.

    The cache (rotary_pos_embedding.py, `RotaryEmbedding`) keeps the module that made the angles and, through the hooks
    that gather weights, the whole model.
    """
    RotaryEmbedding.forward.cache_clear()
