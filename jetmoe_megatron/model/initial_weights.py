"""Initial weights that depend on the seed and the parameter's name alone, never on the parallel layout.

Every matrix is drawn from normal(0, init_std), like `initializer_range` of the released config; norms are 1, biases 0.
Each matrix (each expert's matrix) has its own generator: a rank draws the whole matrix and keeps its slice.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from jetmoe_megatron.model.experts.sharded_weights import ExpertLinear


@torch.no_grad()
def initialize_weights(model: GPTModel, seed: int, std: float) -> None:
    """Fill every parameter of a (virtual) pipeline stage."""
    experts = {id(module.weight): module for module in model.modules() if isinstance(module, ExpertLinear)}
    for name, parameter in global_named_parameters(model):
        if name.endswith("layernorm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(".bias"):
            parameter.zero_()
        elif id(parameter) in experts:
            _draw_experts(parameter, experts[id(parameter)], name, seed, std)
        else:
            parameter.copy_(_own_slice(parameter, name, seed, std))


def global_named_parameters(model: GPTModel) -> list[tuple[str, Tensor]]:
    """The parameters, by the names they would have in one process: a layer has its number in the whole model.

    The copy of the tied embedding that the last pipeline stage keeps has the embedding's name.
    """
    layers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    named = []
    for name, parameter in model.named_parameters():
        for prefix, number in layers.items():
            if name.startswith(prefix):
                name = f"decoder.layers.{number}.{name.removeprefix(prefix)}"
                break
        if name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        named.append((name, parameter))
    return named


def _draw(shape: list[int], std: float, *key: object) -> Tensor:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


def _draw_experts(weight: Tensor, module: ExpertLinear, name: str, seed: int, std: float) -> None:
    first = module.expert_group.rank() * weight.shape[0] if module.expert_group else 0
    axis, ranks, rank = module.tensor_axis - 1, module.tensor_group.size(), module.tensor_group.rank()
    for i, expert_weight in enumerate(weight):
        whole = _draw(list(module.whole_shape[1:]), std, seed, name, first + i)
        expert_weight.copy_(whole.chunk(ranks, dim=axis)[rank])


def _own_slice(parameter: Tensor, name: str, seed: int, std: float) -> Tensor:
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False):
        return _draw(shape, std, seed, name)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    axis = parameter.partition_dim  # type: ignore[attr-defined]
    shape[axis] *= ranks
    return _draw(shape, std, seed, name).chunk(ranks, dim=axis)[rank]
