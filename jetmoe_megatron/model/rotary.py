"""Rotary angles that start again where a sequence's positions do (`data.reset_positions`).

Letters: S sequence, B micro-batch, C channels.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class PositionedRotaryEmbedding(RotaryEmbedding):
    """Megatron's own takes a token's place in the sequence for its position. This one looks at `position_ids`."""

    position_ids_BS: Tensor

    def forward(self, max_seq_len: int, *arguments: Any, **more: Any) -> Tensor:
        """Angles [S, B, 1, C]."""
        angles_SC = super().forward(max_seq_len, *arguments, **more)[:, 0, 0]
        return angles_SC[self.position_ids_BS.t()].unsqueeze(2)


def follow_position_ids(model: GPTModel, rotary_base: float) -> None:
    """Rotate by the `position_ids` that the model's forward is given."""
    rotary = PositionedRotaryEmbedding(
        kv_channels=model.config.kv_channels,
        rotary_percent=1.0,
        rotary_base=rotary_base,
        use_cpu_initialization=model.config.use_cpu_initialization,
    )

    def take_positions(_: GPTModel, arguments: tuple[Any, ...]) -> None:
        rotary.position_ids_BS = arguments[1]

    model.rotary_pos_emb = rotary
    model.register_forward_pre_hook(take_positions)
