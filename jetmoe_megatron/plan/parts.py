"""Which part of the model an operation belongs to, and to which pass of which chunk."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from jetmoe_megatron.plan.timeline import UPDATE

OTHER, OPTIMIZER, ACCUMULATION, LOGITS = "other", "optimizer", "gradient accumulation", "logits and loss"
MOA, SCORES = "moa", "attention scores"
FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"
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


class Place(NamedTuple):
    """Of an operation.

    direction: forward, recompute or backward in a pass; else what was said `outside`.
    chunk: of the model's chunks on this rank, which are its virtual stages; 0 outside of passes.
    """

    part: str
    direction: str
    chunk: int


class Parts:
    """Follows the modules that are called, while it watches.

    A backward operation belongs to the part and chunk of the forward operation that made its node: autograd numbers its
    nodes in the order in which they are made.
    """

    def __init__(self) -> None:
        self._stack = [OTHER]
        self._chunk = 0  # whose module was called last
        self._chunk_of_backward = 0
        self._outside: str | None = UPDATE
        self._numbers, self._made_by = [0], [(OTHER, 0)]  # from which node on it is which part of which chunk

    @contextlib.contextmanager
    def watched(self, chunks: list[nn.Module]) -> Iterator[None]:
        """chunks: the model, whose modules may be wrapped."""
        modules = [module for chunk in chunks for module in chunk.modules()]
        part_of = {id(module): part for module in modules for kind, part in _PARTS.items() if isinstance(module, kind)}
        chunk_of = {id(module): number for number, chunk in enumerate(chunks) for module in chunk.modules()}
        wholes = {id(module) for module in modules if isinstance(module, GPTModel)}
        # The loss follows the output layer, outside of any module.
        ends = {id(module.output_layer) for module in modules if isinstance(module, GPTModel) and module.post_process}

        def enter(module: nn.Module, arguments: Any) -> None:
            if id(module) in ends:
                self._stack[-1] = LOGITS
                self._turn()
            elif id(module) in wholes or id(module) in part_of:
                if len(self._stack) == 1:
                    self._stack[0] = OTHER  # if it was an output layer's that was called without its model
                self._stack.append(part_of.get(id(module), OTHER))
                self._chunk = chunk_of[id(module)]
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

    @contextlib.contextmanager
    def outside(self, of_passes: str | None) -> Iterator[None]:
        """Within it, operations that no backward pass runs are in no pass, but in what is given; in passes if None."""
        before, self._outside = self._outside, of_passes
        try:
            yield
        finally:
            self._outside = before

    def now(self) -> Place:
        node = torch._C._current_autograd_node()
        if node is None:
            if self._outside:
                return Place(self._stack[-1] if len(self._stack) > 1 else OTHER, self._outside, 0)
            return Place(self._stack[-1], FORWARD, self._chunk)
        if len(self._stack) > 1:
            return Place(self._stack[-1], RECOMPUTE, self._chunk)
        number = node._sequence_nr()
        if number >= _NEVER_MADE:
            return Place(ACCUMULATION, BACKWARD, self._chunk_of_backward)
        part, self._chunk_of_backward = self._made_by[bisect_right(self._numbers, number) - 1]
        return Place(part, BACKWARD, self._chunk_of_backward)

    def _turn(self) -> None:
        number, maker = torch.autograd._get_sequence_nr(), (self._stack[-1], self._chunk)
        if self._numbers[-1] == number:
            self._made_by[-1] = maker
        else:
            self._numbers.append(number)
            self._made_by.append(maker)
