"""The weights of many experts as one parameter, and how it is sharded and saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from jetmoe_megatron.model.config import JetMoEConfig
from jetmoe_megatron.model.experts import open_backend
from jetmoe_megatron.model.experts.delayed_gradient import DelayedGradient


class ExpertLinear(nn.Module):
    """One linear layer for each expert, `weight` of shape [local experts, *rows, in] with rows flattened on use.

    The experts are split over `expert_group`, and one dimension of each expert's matrix over `tensor_group`. Both
    splits are plain slices, so a checkpoint holds one plain tensor [experts, *rows, in] that any layout can load.
    """

    def __init__(
        self,
        config: JetMoEConfig,
        shape: tuple[int, ...],
        tensor_axis: int,
        expert_group: ProcessGroup | None,
        tensor_group: ProcessGroup,
        replica_group: ProcessGroup,
        delay_gradient: bool = False,
    ) -> None:
        """
        Args:
            shape: [experts, *rows, in] of the whole layer.
            tensor_axis: the dimension of `shape` that `tensor_group` splits.
            expert_group: None keeps every expert on every rank.
            replica_group: ranks that hold the same slice.
            delay_gradient: the weight's gradient is computed by `backward_dw`, not in the backward pass.
        """
        super().__init__()
        self.backend = open_backend(config.expert_backend)
        self.whole_shape, self.tensor_axis = shape, tensor_axis
        self.expert_group, self.tensor_group, self.replica_group = expert_group, tensor_group, replica_group
        local = list(shape)
        local[0] //= expert_group.size() if expert_group else 1
        local[tensor_axis] //= tensor_group.size()
        self.weight = nn.Parameter(torch.empty(local, dtype=config.params_dtype, device=torch.cuda.current_device()))
        # Megatron's DDP reduces gradients of parameters without `allreduce` over the expert-data-parallel group.
        dense = get_process_group_ranks(parallel_state.get_data_parallel_group(with_context_parallel=True))
        self.weight.allreduce = get_process_group_ranks(replica_group) == dense  # type: ignore[attr-defined]
        # clip_grads counts a parameter on every tensor rank only if it is marked as split.
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = tensor_axis  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]
        self.delayed = DelayedGradient(self.weight) if delay_gradient else None

    def forward(self, x_ND: Tensor, count_E: Tensor) -> Tensor:
        """Rows [N, in] sorted by expert -> [N, rows]."""

        def linear(x_ND: Tensor, weight: Tensor) -> Tensor:
            return self.backend.linear(x_ND, weight.flatten(1, -2), count_E)

        return linear(x_ND, self.weight) if self.delayed is None else self.delayed.apply(linear, x_ND)

    def backward_dw(self) -> None:
        """Megatron's hook for a delayed weight gradient: that of the oldest backward pass that still lacks it."""
        if self.delayed is not None:
            self.delayed.compute()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Megatron's DDP: what to do with a delayed gradient."""
        if self.delayed is not None:
            self.delayed.hooks.append(hook)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Megatron's description of this slice: where it lies in the whole tensor and which ranks hold copies."""
        layers = len(sharded_offsets)  # a homogeneous block stacks its layers in front
        offsets = [(layers + self.tensor_axis, self.tensor_group.rank(), self.tensor_group.size())]
        if self.expert_group:
            offsets.append((layers, self.expert_group.rank(), self.expert_group.size()))
        return {
            f"{prefix}weight": ShardedTensor.from_rank_offsets(
                f"{prefix}weight",
                self.weight,
                *sharded_offsets,
                *offsets,
                replica_id=(0, 0, self.replica_group.rank()),
                prepend_axis_num=layers,
            )
        }
