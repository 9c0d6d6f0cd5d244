"""The gradient norm and clipping by it, through Megatron's functions but with faster and more exact parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer, clip_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

_SUMMED_AT_ONCE = 512


def clip_gradients(optimizer: MegatronOptimizer, gradient_norm: float) -> None:
    """Scale all gradients so that their norm is at most `optimizer.clip_grad`. Nothing happens if that is 0.

    gradient_norm: over all parameters of the model, from Megatron's `get_grad_norm`.
    """
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, gradient_norm)


def replace_norm_and_scale() -> None:
    """From now on Megatron's `get_grad_norm` and clipping use the functions below."""
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = _l2_norm, _scale


def _l2_norm(chunk_size: int, flag: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Replaces the one that Megatron has without Transformer Engine and Apex, which waits once per tensor.

    Source: megatron/core/utils.py, `local_multi_tensor_l2_norm`.
    """
    return norm(tensors[0]).unsqueeze(0), None


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all numbers of the tensors together, in fp32."""
    parts = [part for t in tensors for part in ([t] if t.is_cuda else _in_parts(t.flatten()))]
    return torch.nn.utils.get_total_norm(parts)


def _in_parts(x: Tensor) -> list[Tensor]:
    """Few numbers whose norm is that of the vector `x`: the norms of equal parts of it, and its remaining numbers.

    On a CPU, torch adds squares one by one in fp32: the sum of ten million is wrong in the fourth digit.
    """
    whole = len(x) - len(x) % _SUMMED_AT_ONCE
    return [torch.linalg.vector_norm(x[:whole].view(-1, _SUMMED_AT_ONCE), dim=1), x[whole:]]


def _scale(chunk_size: int, flag: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    """Scale in place. Megatron's own makes a copy of each gradient and copies it back.

    Source: megatron/core/utils.py, `local_multi_tensor_scale`.
    """
    torch._foreach_mul_(tensors[1], scale)
