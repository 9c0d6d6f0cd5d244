"""The expert matmuls: one interface, one file per backend.

Every backend is a function `grouped_linear(x_ND, w_EFD, count_E) -> y_NF`: rows are sorted by expert, expert e owns
the next `count_E[e]` rows, and each row is multiplied by its expert's weight, `y = x @ w[e].T`.
`loop.py` is the reference the others are tested against.

Letters: N rows (token, slot pairs), D input width, F output width, E local experts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.model.experts import loop, torch_grouped

GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS: dict[str, GroupedLinear] = {"loop": loop.grouped_linear, "torch": torch_grouped.grouped_linear}


def resolve_backend(model: Model, precision: str) -> str:
    """The backend that `model.expert_backend` stands for: `auto` takes torch's kernel wherever the shapes allow it.

    Raises:
        UserError: if the backend was asked for by name and cannot serve these shapes.
    """
    if model.expert_backend == "loop":
        return "loop"
    multiple = torch_grouped.width_multiple(precision)
    widths = {
        "hidden_size": model.hidden_size,
        "num_kv_heads x kv_channels": model.num_kv_heads * model.kv_channels,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    uneven = [f"{key} ({width})" for key, width in widths.items() if width % multiple]
    if not uneven:
        return "torch"
    if model.expert_backend == "torch":
        raise UserError(
            f"model.expert_backend: torch needs widths that are multiples of {multiple} in {precision}; "
            f"{', '.join(uneven)} is not: use auto or loop"
        )
    return "loop"
