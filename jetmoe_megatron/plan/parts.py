"""Which part of the model an operation belongs to, in the forward and in the backward pass."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from jetmoe_megatron.model.attention import MixtureOfAttention
from jetmoe_megatron.model.experts.glu import GLUExperts
from jetmoe_megatron.model.mlp import MixtureOfMLPs
from jetmoe_megatron.model.norm import RMSNorm
from jetmoe_megatron.model.router import AttentionRouter, MLPRouter

OTHER, OPTIMIZER, ACCUMULATION, LOGITS = "other", "optimizer", "gradient accumulation", "logits and loss"
MOA, SCORES = "moa", "attention scores"
_NEVER_MADE = 2**63  # autograd's numbers from here on: nodes that add a gradient to a weight's
_PARTS: dict[type[nn.Module], str] = {
    LanguageModelEmbedding: "embedding",
    RMSNorm: "norms",
    MixtureOfAttention: MOA,
    MixtureOfMLPs: "moe",
    GLUExperts: "moe",  # for an overlapped exchange, which does not call the whole layer
    AttentionRouter: "moa router",
    MLPRouter: "moe router",
}


class Parts:
    """Follows the modules that are called, while it watches.

    A backward operation belongs to the part of the forward operation that made its node: autograd numbers its nodes in
    the order in which they are made.
    """

    def __init__(self) -> None:
        self._stack = [OTHER]
        self._numbers, self._parts = [0], [OTHER]  # from which node on it is which part

    @contextlib.contextmanager
    def watched(self, chunks: list[nn.Module]) -> Iterator[None]:
        """chunks: the model, whose modules may be wrapped."""
        modules = [module for chunk in chunks for module in chunk.modules()]
        part_of = {id(module): part for module in modules for kind, part in _PARTS.items() if isinstance(module, kind)}
        wholes = {id(module) for module in modules if isinstance(module, GPTModel)}
        # The loss follows the output layer, outside of any module.
        ends = {id(module.output_layer) for module in modules if isinstance(module, GPTModel) and module.post_process}

        def enter(module: nn.Module, arguments: Any) -> None:
            if id(module) in ends:
                self._stack[-1] = LOGITS
                self._turn()
            elif id(module) in wholes or id(module) in part_of:
                self._stack.append(part_of.get(id(module), OTHER))
                self._turn()

        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            if id(module) in wholes or id(module) in part_of:
                self._stack.pop()
                self._turn()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        self._stack.append(part)
        try:
            yield
        finally:
            self._stack.pop()

    def now(self) -> tuple[str, str]:
        """The part, and `forward`, `backward` or `recompute`."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._stack[-1], "forward"
        if len(self._stack) > 1:
            return self._stack[-1], "recompute"
        number = node._sequence_nr()
        if number >= _NEVER_MADE:
            return ACCUMULATION, "backward"
        return self._parts[bisect_right(self._numbers, number) - 1], "backward"

    def _turn(self) -> None:
        number = torch.autograd._get_sequence_nr()
        if self._numbers[-1] == number:
            self._parts[-1] = self._stack[-1]
        else:
            self._numbers.append(number)
            self._parts.append(self._stack[-1])
