"""Rehearses one step of one rank: the real model, buffers, optimizer and schedule, on tensors without numbers.

Nothing of the program knows that it is rehearsed. What differs is around it: process groups whose collectives return at
once (`fake_world.py`), the kernels of the device in question (`ways.py`), and answers where the host reads numbers
(`host_values.py`).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from jetmoe_megatron.checkpoint.optimizer_state import gather, own_state
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.step_batches import MicroBatch
from jetmoe_megatron.model.build import build_model
from jetmoe_megatron.model.rotary import forget_angles
from jetmoe_megatron.plan.fake_world import NOWHERE, fake_world
from jetmoe_megatron.plan.host_values import HostValues
from jetmoe_megatron.plan.memory import ACTIVATIONS, Ledger
from jetmoe_megatron.plan.parts import OPTIMIZER, Parts
from jetmoe_megatron.plan.rehearsal import Kernels, Memory, Rehearsal, Transfers, Waits
from jetmoe_megatron.plan.routing import Routing
from jetmoe_megatron.plan.timeline import REDUCTION, UPDATE
from jetmoe_megatron.plan.tracer import Tracer
from jetmoe_megatron.plan.ways import as_a_gpu, as_the_cpu
from jetmoe_megatron.plan.work import Work, extrapolated
from jetmoe_megatron.training import step
from jetmoe_megatron.training.metrics import reduce_metrics
from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel
from jetmoe_megatron.training.step import compute_gradients, update_weights

Device = Literal["gpu", "cpu"]
_BLOCK = {"gpu": 512, "cpu": 1}  # CUDACachingAllocator's kMinBlockSize, in bytes
WEIGHTS, MAIN_WEIGHTS, GRADIENTS, STATE = "weights", "main weights", "gradients", "optimizer state"
_KEPT = WEIGHTS, MAIN_WEIGHTS, GRADIENTS, STATE


def rehearse(run: Run, layout: Layout, rank: int, device: Device = "gpu", imbalance: float = 1.0) -> Rehearsal:
    """One step of `rank` in the layout's world.

    Args:
        device: whose kernels are taken.
        imbalance: rows of a layer's fullest expert, divided by the mean.
    """
    with _rehearsing(run, layout, rank, device, imbalance) as tracer:
        return _rehearse(run, layout, rank, device, imbalance, tracer)


def kept_bytes(run: Run, layout: Layout, rank: int) -> int:
    """What `rank` holds on a GPU between steps: weights, gradients, main weights and optimizer state."""
    with _rehearsing(run, layout, rank, "gpu", 1.0) as tracer:
        _build(run, layout, tracer)
        return sum(tracer.ledger.held[kind] for kind in _KEPT)


@contextlib.contextmanager
def _rehearsing(run: Run, layout: Layout, rank: int, device: Device, imbalance: float) -> Iterator[Tracer]:
    routing = Routing(run.model.num_experts, run.model.top_k, imbalance)
    with fake_world(run, layout, rank):
        tracer = Tracer(Parts(), HostValues(routing), Ledger(_BLOCK[device]), causal_half=device == "gpu")
        way = as_a_gpu(tracer) if device == "gpu" else as_the_cpu(tracer)
        no_scale = patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)  # which outlives a model
        with way, no_scale, tracer, tracer.ledger.resizes():
            yield tracer


def _build(run: Run, layout: Layout, tracer: Tracer) -> tuple[list[Any], Any]:
    """The model and its optimizer, in the tracer's ledger."""
    # Some parameters are made on the CPU and moved. Moving one to where it has no numbers would make another one,
    # without Megatron's marks.
    with tracer.on_the_cpu(without_numbers="floats"), contextlib.redirect_stdout(io.StringIO()):
        model = wrap_for_data_parallel(run, build_model(run, layout, draw_weights=False))
    _know_reductions(tracer.parts, model[0].config)
    optimizer = build_optimizer(run, model)
    for kind, tensors in _kept(model, optimizer).items():
        for tensor in tensors:
            tracer.ledger.hold(tensor, kind)
            tracer.ledger.name(tensor, kind, only=ACTIVATIONS)
    return model, optimizer


def _rehearse(run: Run, layout: Layout, rank: int, device: Device, imbalance: float, tracer: Tracer) -> Rehearsal:
    model, optimizer = _build(run, layout, tracer)
    kept = {kind: tracer.ledger.held[kind] for kind in _KEPT}
    few, more = _shortest_steps(layout)
    work = _step(run, model, optimizer, few, tracer)
    if more > few:
        in_a_longer_step = _step(run, model, optimizer, more, tracer)
        work = extrapolated(work, in_a_longer_step, (layout.micro_batches - more) // (more - few))
    peak_in_save = _peak_in_save(optimizer, tracer)
    forget_angles()
    return Rehearsal(
        rank=rank,
        world=layout.world,
        device=device,
        place=_place(),
        micro_batches=layout.micro_batches,
        parameters=sum(parameter.numel() for chunk in model for parameter in chunk.parameters()),
        imbalance=imbalance,
        memory=Memory(kept, work.peak, work.peak_in_update, peak_in_save),
        kernels=_kernels(work),
        transfers=[
            Transfers(**{**vars(sent), "ranks": list(sent.ranks)}, number=number)
            for sent, number in work.transfers.items()
        ],
        host_waits=[Waits(**vars(wait), number=number) for wait, number in work.host_waits.items()],
    )


def _shortest_steps(layout: Layout) -> tuple[int, int]:
    """Micro-batches of two steps that differ by what each further group adds; twice all of them if they are few.

    In the shorter step, the pipeline is full for a while. Its last group is as large as in the whole step.
    """
    at_once = layout.micro_batch_group
    few = 2 * at_once + layout.micro_batches % at_once if layout.virtual_pipeline > 1 else layout.pipeline
    if few + at_once >= layout.micro_batches:
        return layout.micro_batches, layout.micro_batches
    return few, few + at_once


def _step(run: Run, model: list[Any], optimizer: Any, micro_batches: int, tracer: Tracer) -> Work:
    """What a step of so many micro-batches computes, sends and holds."""
    ledger, work = tracer.ledger, Work()
    tracer.work = work
    ledger.restart_peak()
    with tracer.parts.watched(model), _passes_known(tracer.parts):
        losses, norm = compute_gradients(model, optimizer, [_micro_batch(run)] * micro_batches)
        reduce_metrics(model, losses, norm, data_wait=0.0, stop=False)
        work.peak = _positive(ledger.peak)
        ledger.restart_peak()
        with tracer.parts.during(OPTIMIZER), _adamw_anywhere():
            update_weights(optimizer, norm, run.optimizer.max_lr)
        work.peak_in_update = _positive(ledger.peak)
    return work


def _peak_in_save(optimizer: Any, tracer: Tracer) -> dict[str, int]:
    """When the ranks exchange their parts of the optimizer's state on the GPU. All else goes to the host at once."""
    tracer.work = Work()
    with _disable_current_modes():
        state = own_state(optimizer)  # of what is in parts, only shapes
    tracer.ledger.restart_peak()
    gather(optimizer, state, entries=[])
    return _positive(tracer.ledger.peak)


@contextlib.contextmanager
def _passes_known(parts: Parts) -> Iterator[None]:
    """Within it, what Megatron's schedule runs is in passes, unless it only counts what routers choose."""

    def schedule() -> Callable[..., Any]:
        original = get_forward_backward_func()

        def run(**arguments: Any) -> Any:
            with parts.outside(UPDATE if arguments["forward_only"] else None):
                return original(**arguments)

        return run

    with patch.object(step, "get_forward_backward_func", schedule):
        yield


def _know_reductions(parts: Parts, config: Any) -> None:
    """What Megatron's schedule calls to reduce gradients is in no pass."""
    reduction = parts.outside(REDUCTION)
    config.finalize_model_grads_func = reduction(config.finalize_model_grads_func)
    start = config.grad_sync_func
    if start is not None:
        config.grad_sync_func = [reduction(one) for one in start] if isinstance(start, list) else reduction(start)


def _kept(model: list[Any], optimizer: Any) -> dict[str, list[Tensor]]:
    """What a rank keeps between steps. A later kind does not count what an earlier one has."""
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return {
        WEIGHTS: [tensor for chunk in model for tensor in (*chunk.parameters(), *chunk.module.buffers())],
        GRADIENTS: [buffer.grad_data for buffer in buffers],
        MAIN_WEIGHTS: [tensor for part in inner for group in part.param_groups for tensor in group["params"]],
        STATE: [x for part in inner for state in part.state.values() for x in state.values() if isinstance(x, Tensor)],
    }


def _micro_batch(run: Run) -> MicroBatch:
    shape = run.batch.micro_sequences, run.batch.sequence_length
    whole = torch.empty(shape, dtype=torch.int64, device=NOWHERE)
    batch: MicroBatch = {
        "tokens": whole,
        "labels": whole,
        "position_ids": whole,
        "loss_mask": torch.empty(shape, device=NOWHERE),
    }
    if run.data.mask_attention:
        batch["document"] = whole
    return batch


def _adamw_anywhere() -> contextlib.AbstractContextManager[Any]:
    """torch has the fused AdamW for devices that it knows."""
    return patch.object(torch.optim.AdamW, "_need_device_dtype_check_for_fused", False, create=True)


def _place() -> dict[str, int]:
    return {
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
        "expert": parallel_state.get_expert_model_parallel_rank(),
        "expert tensor": parallel_state.get_expert_tensor_parallel_rank(),
    }


def _positive(sizes: Mapping[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in sizes.items() if size}


def _kernels(work: Work) -> list[Kernels]:
    return [
        Kernels(**vars(one), number=number, flops=work.flops[one], bytes=work.bytes[one])
        for one, number in work.kernels.items()
    ]
