"""Steps on real ranks, measured by what the rehearsal does not use.

torch's profiler sees each allocation of the CPU's allocator, also those inside of an operation. torch's counter counts
FLOPs. The process groups record what is sent. The objects themselves tell their sizes.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.parallel.collectives import Event
from tests.parallel.oracle import training
from tests.parallel.recorder import gloo, record


class Sent(NamedTuple):
    """A collective or a message. Elements: of the tensor that this rank gives, or gets if it gives none."""

    members: tuple[int, ...]
    kind: str
    dtype: str
    elements: int


@dataclass
class Sizes:
    parameters: int
    weights: int  # in bytes, as all below
    gradients: int
    optimizer: int  # main weights and moments, and the number of the step of each parameter
    in_step: int  # allocated in a step, when most was


@dataclass
class Done:
    flops: int
    flops_of_modules: dict[str, int]
    sent: Counter[Sent]


def real_sizes(tree: dict[str, Any], imbalance: float) -> Sizes:
    """In a rank."""
    Work.wait = _until_only_this_thread_has_it(Work.wait)  # type: ignore[method-assign]
    with _step(tree, 1, imbalance) as (model, optimizer, gradients, (batches,)):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            gradients(batches)
        parts = [part.optimizer for part in optimizer.chained_optimizers]
        state = [x for part in parts for group in part.param_groups for x in group["params"]]
        state += [x for part in parts for own in part.state.values() for x in own.values() if torch.is_tensor(x)]
        seen: set[int] = set()
        return Sizes(
            parameters=sum(x.numel() for chunk in model for x in chunk.parameters()),
            weights=new_bytes([x for c in model for x in (*c.parameters(), *c.module.buffers())], seen),
            gradients=new_bytes([b.grad_data for c in model for b in c.buffers + c.expert_parallel_buffers], seen),
            optimizer=new_bytes(state, seen),
            in_step=peak(profiler),
        )


def real_work(tree: dict[str, Any], imbalance: float, folder: Path, port: int) -> Done:
    """In a rank.

    Args:
        folder: for the records of what is sent.
        port: of the store of `store_of_ranks`.
    """
    from jetmoe_megatron.training.step import update_weights

    record(folder, port, gloo, lambda: None)
    with _step(tree, 1, imbalance) as (_, optimizer, gradients, (batches,)):
        trace, flops = folder / os.environ["RANK"], FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        before = len(trace.read_bytes())
        with flops:
            update_weights(optimizer, gradients(batches), 1e-3)
        calls = trace.read_bytes()[before:].splitlines()
        return Done(
            flops.get_total_flops(), by_kind_of_module(flops), Counter(sent(Event(*json.loads(call))) for call in calls)
        )


@contextmanager
def _step(
    tree: dict[str, Any], steps: int, imbalance: float
) -> Iterator[tuple[list[Any], Any, Callable[..., float], Any]]:
    """The model, the optimizer, the first half of a step as a function of its batches, and the batches of each step."""
    from jetmoe_megatron.model.router import Router
    from jetmoe_megatron.training.metrics import reduce_metrics
    from jetmoe_megatron.training.optimizer import build_optimizer
    from jetmoe_megatron.training.step import compute_gradients

    with training(tree, steps) as (run, model, batches_of_steps):
        optimizer = build_optimizer(run, model)
        Router.gating = routed(Router.gating, run.model.top_k, imbalance)  # type: ignore[method-assign]

        def gradients(batches: Any) -> float:
            losses, norm = compute_gradients(model, optimizer, batches)
            reduce_metrics(model, losses, norm, data_wait=0.0, stop=False)
            return norm

        yield model, optimizer, gradients, batches_of_steps


def by_kind_of_module(flops: FlopCounterMode) -> dict[str, int]:
    """What torch's counter has for each kind of module. A router is in both its own kind and that around it."""
    found: Counter[str] = Counter()
    for name, counts in flops.get_flop_counts().items():
        kind = name.rpartition(".")[2]
        if kind in ("self_attention", "mlp", "router", "output_layer"):
            found[kind] += sum(counts.values())
    return found


def _until_only_this_thread_has_it(wait: Callable[..., bool]) -> Callable[..., bool]:
    """The profiler sees what this thread frees: those of gloo must let go of a tensor before."""

    def waited(work: Work, *arguments: Any) -> bool:
        done = wait(work, *arguments)
        time.sleep(0.003)
        return done

    return waited


def new_bytes(tensors: list[Tensor], seen: set[int]) -> int:
    """Of storages that are not among those seen."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def peak(profiler: Any) -> int:
    """The largest sum of what was allocated and not freed, in bytes."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def routed(gating: Any, top_k: int, imbalance: float) -> Any:
    """The router's logits, raised where tokens shall go: each expert has an equal share, or the first has more."""

    def chosen(router: Any, input: Tensor) -> Tensor:
        logits_SBE = gating(router, input)
        with torch.no_grad():
            logits_TE = logits_SBE.flatten(0, 1)
            tokens, experts = logits_TE.shape
            rows = tokens * top_k
            first = round(imbalance * rows / experts) if imbalance > 1 else None
            if first is None:
                expert_N = [row * experts // rows for row in range(rows)]
            else:
                expert_N = [0] * first + [1 + row * (experts - 1) // (rows - first) for row in range(rows - first)]
            raised = torch.zeros(tokens, experts)
            raised[[row % tokens for row in range(rows)], expert_N] = 1e3
            logits_TE += raised
        return logits_SBE

    return chosen


def _attention(matmuls: int, q: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, channels = q
    return matmuls * 2 * batch * heads * length * length * channels


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[-2] * a[-1] * b[-1]


aten = torch.ops.aten
_FORMULAS = {
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: partial(_attention, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, *a, **k: _attention(5, q),
}


def sent(event: Event) -> Sent:
    """The record of a call in few words."""
    kind, members = event.kind.split()[0], tuple(event.members)
    if event.sent:
        return Sent(members, kind, event.what, event.sent[0] if kind == "all_gather" else sum(event.sent))
    number, _, dtype = event.what.split()[:3]
    return Sent(members, kind, dtype, int(number))
