"""Megatron-Core's own MoE layer, with each of its expert classes, and ours: forward and backward of one layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

from benchmarks.contestants import Step
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.config import transformer_config
from jetmoe_megatron.model.experts.glu import GLUExperts
from jetmoe_megatron.model.mlp import MixtureOfMLPs
from jetmoe_megatron.model.router import MLPRouter
from jetmoe_megatron.runtime.device import device

OURS = "ours"


def layer_names() -> list[str]:
    """The layers whose packages are installed."""
    return [OURS, "SequentialMLP", *(["TEGroupedMLP"] if torch.cuda.is_available() and HAVE_TE else [])]


def layer_step(name: str, run: Run) -> Step:
    """Router, dispatch, experts and combination, forward and backward, on random activations."""
    config = copy.copy(transformer_config(run, resolve_layout(run, 1)))
    layer = _layer(name, config).to(device()).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.01)
    length, sequences = run.batch.sequence_length, run.batch.micro_sequences
    x = torch.randn(length, sequences, run.model.hidden_size, dtype=config.params_dtype, device=device())
    g = torch.randn_like(x)
    x.requires_grad_()

    def step() -> None:
        layer.zero_grad()
        output, _ = layer(x)
        output.backward(g)

    return step


def _layer(name: str, config: Any) -> MoELayer:
    if name == OURS:
        return MixtureOfMLPs(config, submodules=MoESubmodules(experts=GLUExperts, router=MLPRouter), layer_number=1)
    # As Megatron's users would run it: everything fused that it can fuse.
    config.bias_activation_fusion = torch.cuda.is_available()
    config.moe_permute_fusion = torch.cuda.is_available() and HAVE_TE
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts: ModuleSpec | type = ModuleSpec(SequentialMLP, submodules=linear)
    if name == "TEGroupedMLP":
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TERowParallelGroupedLinear,
        )

        linear = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        experts = ModuleSpec(TEGroupedMLP, submodules=linear)
    return MoELayer(config, submodules=MoESubmodules(experts=experts, router=MLPRouter), layer_number=1)
