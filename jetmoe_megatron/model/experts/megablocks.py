"""MegaBlocks' dropless path (arXiv 2211.15841): its gather, grouped matmul and weighted scatter.

Its layers are not used: they have their own router, losses and expert-parallel exchange, which conflict with
Megatron-Core's. Its block-sparse matmuls refuse triton 3.2 and newer (megablocks/layers/arguments.py, `__post_init__`).
"""

from __future__ import annotations

from megablocks import grouped_gemm_util, ops
from torch import Tensor

from jetmoe_megatron.model.permutation import Permutation


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """`y = x @ w[e].T` for each expert's rows. Returns [N, F]. The counts must be on the host (grouped_gemm.cu)."""
    return grouped_gemm_util.ops.gmm(x_ND.contiguous(), w_EFD, count_E.long(), trans_b=True)


def gather(x_TD: Tensor, permutation: Permutation, slots: int) -> Tensor:
    return ops.gather(x_TD.contiguous(), *_plan(permutation), slots)


def scatter(y_ND: Tensor, gate_TK: Tensor | None, permutation: Permutation, slots: int) -> Tensor:
    indices, experts, ends = _plan(permutation)
    # The gates' gradient comes back in the rows' dtype (megablocks/backend/kernels.py, `padded_scatter_wgrad`).
    gate_N = None if gate_TK is None else gate_TK.flatten().to(y_ND.dtype)
    return ops.scatter(y_ND.contiguous(), indices, experts, gate_N, ends, slots)


def _plan(permutation: Permutation) -> tuple[Tensor, Tensor, Tensor]:
    return permutation.order_N.int(), permutation.expert_N.int(), permutation.end_E
