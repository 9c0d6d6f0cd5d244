"""Train a few steps in a layout and join the parts of every gradient and weight, to compare them with one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.data.step_batches import StepBatches
from jetmoe_megatron.monitor.routers import RouterMetrics
from tests.ranks import run_ranks


@dataclass
class Outcome:
    """What a layout computed; whole tensors under the names of one process."""

    losses: list[dict[str, float]]  # per step, with the gradient norm
    gradients: dict[str, Tensor]  # of the first step
    weights: dict[str, Tensor]  # after the last
    routers: dict[str, RouterMetrics]  # of all steps, by kind


@dataclass
class _Piece:
    """A rank's slice of a tensor: where it lies in the whole one."""

    name: str
    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    value: Tensor


def outcome(
    tree: dict[str, Any], ranks: int, steps: int = 3, prepare: Callable[[list[Any]], None] | None = None
) -> Outcome:
    """`prepare` is called on each rank with the wrapped model."""
    return joined(run_ranks(ranks, train, tree, steps, prepare))


def joined(results: list[Any]) -> Outcome:
    """What the ranks returned, as one."""
    gradients = assemble([piece for _, pieces, *_ in results for piece in pieces])
    weights = assemble([piece for *_, pieces, _ in results for piece in pieces])
    return Outcome(losses=results[0][0], gradients=gradients, weights=weights, routers=results[0][-1])


def initial_weights(tree: dict[str, Any], ranks: int) -> dict[str, Tensor]:
    return assemble([piece for pieces in run_ranks(ranks, _initial_weights, tree) for piece in pieces])


def router_gradients(tree: dict[str, Any], ranks: int) -> dict[str, dict[str, Tensor]]:
    """Gradients of the first step on the router weights: `lm`, `balance` and `z` apart, with coefficient 1."""
    results = run_ranks(ranks, _router_gradients, tree)
    total = {name: assemble([piece for result in results for piece in result[name]]) for name in results[0]}
    return {
        "lm": total["lm"],
        **{
            name: {weight: total[name][weight] - total["lm"][weight] for weight in total["lm"]}
            for name in ("balance", "z")
        },
    }


class Samples(Dataset):
    """Sample n is the same random sequence in every layout, masked: with as random a part of it left out.

    reset: positions begin again, at a place of its own.
    """

    def __init__(self, length: int, vocab: int, masked: bool, reset: bool) -> None:
        self.length, self.vocab, self.masked, self.reset = length, vocab, masked, reset

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(number)
        text = torch.randint(self.vocab, (self.length + 1,), generator=random)
        hidden = torch.rand(self.length, generator=random) < torch.rand(1, generator=random)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": 1.0 - (hidden & self.masked).float(),
            "position_ids": torch.arange(self.length) % (5 + number if self.reset else self.length),
        }


@contextlib.contextmanager
def training(tree: dict[str, Any], steps: int) -> Iterator[tuple[Run, list[Any], StepBatches]]:
    """A wrapped model and its batches in a layout of as many ranks as there are processes."""
    from jetmoe_megatron.training.ranks.process_groups import parallel_groups

    torch.set_num_threads(1)
    run = Run.model_validate(tree)
    layout = resolve_layout(run, int(os.environ["WORLD_SIZE"]))
    with parallel_groups(run, layout):
        from megatron.core import parallel_state as groups

        from jetmoe_megatron.model.build import build_model
        from jetmoe_megatron.training.optimizer import wrap_for_data_parallel

        model = wrap_for_data_parallel(run, build_model(run, layout))
        samples = Samples(run.batch.sequence_length, run.model.vocab_size, run.data.mask_loss, run.data.reset_positions)
        shares = (layout.micro_batches, run.batch.micro_sequences, layout.data, groups.get_data_parallel_rank())
        yield run, model, StepBatches(samples, range(steps), *shares)


def train(
    tree: dict[str, Any], steps: int, prepare: Callable[[list[Any]], None] | None = None
) -> tuple[list[dict[str, float]], list[_Piece], list[_Piece], dict[str, RouterMetrics]]:
    with training(tree, steps) as (run, model, batches_of_steps):
        from jetmoe_megatron.training.optimizer import build_optimizer, settle_weights
        from jetmoe_megatron.training.router_metrics import RouterSums

        if prepare:
            prepare(model)
        optimizer, sums = build_optimizer(run, model), RouterSums(run, model)
        losses, gradients = [], []
        for step, batches in enumerate(batches_of_steps):
            losses.append(train_step(model, optimizer, batches, run.optimizer.max_lr))
            sums.add_step()
            if step == 0:
                _gather_gradients(model)
                gradients = pieces(model, _gradient_of)
        settle_weights(model)
        return losses, gradients, pieces(model, weight_of), sums.reduce()


def train_step(model: list[Any], optimizer: Any, batches: Any, learning_rate: float) -> dict[str, float]:
    """A whole step, without the guard. Returns its numbers."""
    from jetmoe_megatron.training.metrics import reduce_metrics
    from jetmoe_megatron.training.step import compute_gradients, update_weights

    losses, norm = compute_gradients(model, optimizer, batches)
    update_weights(optimizer, norm, learning_rate)
    metrics = reduce_metrics(model, losses, norm, data_wait=0.0, stop=False)[0].dump()
    return {name: value for name, value in metrics.items() if "memory" not in name}


def _initial_weights(tree: dict[str, Any]) -> list[_Piece]:
    with training(tree, 1) as (_, model, _):
        return pieces(model, weight_of)


def _router_gradients(tree: dict[str, Any]) -> dict[str, list[_Piece]]:
    result = {}
    with training(tree, 1) as (run, model, batches_of_steps):
        from jetmoe_megatron.training.optimizer import build_optimizer

        (batches,) = batches_of_steps
        optimizer = build_optimizer(run, model)
        for name, coefficients in {"lm": (0.0, 0.0), "balance": (1.0, 0.0), "z": (0.0, 1.0)}.items():
            for chunk in model:
                chunk.config.moe_aux_loss_coeff, chunk.config.moe_z_loss_coeff = coefficients
            train_step(model, optimizer, batches, learning_rate=0.0)  # which leaves the weights as they are
            _gather_gradients(model)
            result[name] = [piece for piece in pieces(model, _gradient_of) if "router" in piece.name]
    return result


def _gather_gradients(model: list[Any]) -> None:
    """The distributed optimizer leaves each rank the reduced gradients of its own share of every bucket."""
    for chunk in model:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def pieces(model: list[Any], value_of: Callable[[Any], Tensor]) -> list[_Piece]:
    """What each parameter of this rank has, and where it belongs."""
    from megatron.core.utils import unwrap_model

    return [piece for chunk in unwrap_model(model) for piece in _chunk_pieces(chunk, value_of)]


def weight_of(parameter: Any) -> Tensor:
    return parameter.detach()


def _gradient_of(parameter: Any) -> Tensor:
    return parameter.main_grad


def _chunk_pieces(chunk: Any, value_of: Callable[[Any], Tensor]) -> list[_Piece]:
    from megatron.core import parallel_state

    from jetmoe_megatron.model.experts.sharded_weights import ExpertLinear
    from jetmoe_megatron.model.initial_weights import global_named_parameters

    experts = {id(m.weight): m for m in chunk.modules() if isinstance(m, ExpertLinear)}
    found = []
    for name, parameter in global_named_parameters(chunk):
        value = value_of(parameter).float().clone()
        shape, slices = list(value.shape), [slice(0, size) for size in value.shape]

        def split(axis: int, group: Any, shape: list[int] = shape, slices: list[slice] = slices) -> None:
            local = shape[axis]
            slices[axis] = slice(group.rank() * local, (group.rank() + 1) * local)
            shape[axis] = local * group.size()

        if id(parameter) in experts:
            module = experts[id(parameter)]
            split(module.tensor_axis, module.tensor_group)
            if module.expert_group:
                split(0, module.expert_group)
        elif getattr(parameter, "tensor_model_parallel", False):
            axis = parameter.partition_dim  # type: ignore[attr-defined]
            split(axis, parallel_state.get_tensor_model_parallel_group())
        found.append(_Piece(name, tuple(shape), tuple(slices), value))
    return found


def assemble(pieces: list[_Piece]) -> dict[str, Tensor]:
    """Copies of a slice on several ranks must agree."""
    whole: dict[str, Tensor] = {}
    for piece in pieces:
        tensor = whole.setdefault(piece.name, torch.full(piece.shape, float("nan")))
        present = tensor[piece.slices]
        assert present.isnan().all() or relative_error(piece.value, present) < 1e-6, f"copies of {piece.name} differ"
        tensor[piece.slices] = piece.value
    assert not any(tensor.isnan().any() for tensor in whole.values()), "parts of the model are missing"
    return whole


def relative_error(value: Tensor, truth: Tensor) -> float:
    scale = truth.abs().max().item()
    return (value - truth).abs().max().item() / scale if scale else value.abs().max().item()
