"""How the device to rehearse would compute: the kernels that it takes, which the program chooses by what it finds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.fusions import fused_bias_dropout, fused_cross_entropy
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model import build, config, fusion
from jetmoe_megatron.model.experts.choose_backend import Choice, why_not
from jetmoe_megatron.plan.fake_world import NOWHERE
from jetmoe_megatron.plan.memory import ACTIVATIONS
from jetmoe_megatron.plan.tracer import Tracer, one_kernel
from jetmoe_megatron.runtime import cpu

aten = torch.ops.aten
_FUSED = {
    fused_cross_entropy: (
        "calculate_logits_max",
        "calculate_predicted_logits",
        "calculate_cross_entropy_loss",
        "calculate_gradients",
    ),
    fused_bias_dropout: ("bias_dropout_add_fused_train", "bias_dropout_add_fused_inference"),
}


@contextlib.contextmanager
def as_the_cpu(tracer: Tracer) -> Iterator[None]:
    """The program takes a CPU's ways by itself. All that it computes on has no numbers."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", _cpu_attention))
        patches.enter_context(patch.object(torch.Tensor, "type", _type_of_cuda(torch.Tensor.type)))
        patches.enter_context(patch.object(torch, "get_rng_state", _held(torch.get_rng_state, tracer)))
        patches.enter_context(tracer.on_the_cpu(without_numbers="all"))
        yield


@contextlib.contextmanager
def as_a_gpu(tracer: Tracer) -> Iterator[None]:
    """torch's flash attention and grouped matmul, NCCL's collectives, and fused functions as one kernel each.

    That is a GPU of the Hopper kind without Transformer Engine.
    """
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(torch.Tensor, "is_cuda", property(_is_nowhere)))
        patches.enter_context(patch.object(torch.Tensor, "type", _type_of_cuda(torch.Tensor.type)))
        patches.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", _gpu_attention))
        patches.enter_context(patch.object(config, "can_fuse", lambda: True))
        patches.enter_context(patch.object(fusion, "can_fuse", lambda: True))
        patches.enter_context(patch.object(torch, "compile", one_kernel))
        for module, names in _FUSED.items():
            for name in names:
                plain = getattr(module, name)._torchdynamo_orig_callable
                patches.enter_context(patch.object(module, name, one_kernel(plain)))
        for module in (build, config):
            patches.enter_context(patch.object(module, "choose_backend", _gpu_backend))
        # Without what the CPU adapter has changed here.
        patches.enter_context(patch.object(mappings, "torch", torch))
        original = moe_utils.maybe_move_tensor_to_cpu
        patches.enter_context(patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", original))
        patches.enter_context(patch.object(cpu._Inert, "synchronize", lambda *_: tracer.wait()))
        yield


def _gpu_backend(run: Run, layout: Layout) -> Choice:
    """Those with other kernels than torch's cannot be rehearsed: their packages compute on GPUs only."""
    if run.model.expert_backend == "loop" or why_not("torch", run, layout):
        return Choice("loop", "rehearsed")
    return Choice("torch", "rehearsed")


def _held(rng_state: Callable[[], Tensor], tracer: Tracer) -> Callable[[], Tensor]:
    """A recomputed layer keeps states of random numbers. No operation makes them. They are never on a GPU."""

    def held() -> Tensor:
        state = rng_state()
        tracer.ledger.hold(state, ACTIVATIONS)
        return state

    return held


def _is_nowhere(tensor: Tensor) -> bool:
    return tensor.device == NOWHERE


def _type_of_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_type(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
        result = original(tensor, *arguments, **more)
        return result.replace(".meta.", ".") if isinstance(result, str) else result

    return tensor_type


def _gpu_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> Any:
    """Source: torch/aten/src/ATen/native/transformers/attention.cpp, `scaled_dot_product_attention`."""
    if attn_mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, 0.0, is_causal)[0]


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> Any:
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]
