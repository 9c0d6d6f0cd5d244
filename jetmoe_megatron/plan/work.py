"""What a rank computes and sends, counted while it does it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
MESSAGE = "message"  # to or from another stage, between passes


@dataclass(frozen=True)
class Operation:
    """What kernels of one kind have in common."""

    part: str  # of the model
    direction: str  # forward, recompute or backward; reduction or update outside of passes
    chunk: int  # of the model's chunks on the rank
    name: str
    shapes: str  # of the tensors that it reads


@dataclass(frozen=True)
class Transfer:
    """A collective, or a message to or from another rank. Bytes are those of the tensor that this rank gives, or gets
    if it gives none."""

    direction: str  # as of an operation; MESSAGE
    chunk: int
    group: str
    ranks: tuple[int, ...]  # of the world
    kind: str
    dtype: str
    elements: int
    bytes: int


@dataclass(frozen=True)
class Wait:
    """The host waits for the device."""

    direction: str  # as of an operation
    chunk: int
    place: str  # in the program


@dataclass
class Work:
    kernels: Counter[Operation] = field(default_factory=Counter)
    flops: dict[Operation, int] = field(default_factory=dict)  # of one kernel
    bytes: dict[Operation, int] = field(default_factory=dict)  # that one kernel reads and writes
    transfers: Counter[Transfer] = field(default_factory=Counter)
    host_waits: Counter[Wait] = field(default_factory=Counter)
    peak: dict[str, int] = field(default_factory=dict)  # bytes held up to the update, when they were most, by kind
    peak_in_update: dict[str, int] = field(default_factory=dict)


def extrapolated(shorter: Work, longer: Work, times: int) -> Work:
    """A step that is longer than `longer` by so many times what that is longer than `shorter`.

    Where a shape depends on the number of micro-batches, it stays that of `longer`.
    """

    def further(few: Counter[Any], more: Counter[Any]) -> Counter[Any]:
        return Counter({key: n + times * (n - few[key]) * (key in few) for key, n in more.items()})

    return replace(
        longer,
        kernels=further(shorter.kernels, longer.kernels),
        transfers=further(shorter.transfers, longer.transfers),
        host_waits=further(shorter.host_waits, longer.host_waits),
    )


def flops_of(function: Any, arguments: tuple[Any, ...], result: Any, causal_half: bool) -> int:
    """Floating-point operations of matmuls and attention; 0 for others, which memory limits.

    causal_half: attention counts the half of the scores that a causal mask leaves, as the GPU's kernels compute.
    """
    name = function._schema.name.removeprefix("aten::")
    if name == "_grouped_mm":
        a, b = arguments[:2]
        return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
    if name.startswith("_scaled_dot_product"):
        backward = name.endswith("_backward")
        q, k = arguments[backward : backward + 2]
        batch, heads, length, channels = q.shape
        has_mask = "_efficient_" in name and arguments[backward + 3] is not None
        scores = batch * heads * length * k.shape[2] // (2 if causal_half and not has_mask else 1)
        return (5 if backward else 2) * 2 * scores * channels
    formula = flop_registry.get(function._overloadpacket)
    return int(formula(*arguments, out_val=result)) if formula else 0


def size_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def transfers(
    function: Any, arguments: tuple[Any, ...], direction: str, chunk: int
) -> list[tuple[Transfer, list[Tensor], list[Tensor]]]:
    """What a c10d operation sends or receives: each with the tensors that it writes and those that it reads."""
    name = function._schema.name.removeprefix("c10d::")
    kind, wrote, read = _KINDS[name]
    (group,) = (ProcessGroup.unbox(x) for x in arguments if isinstance(x, torch.ScriptObject) and _is_group(x))
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    pass_ = (MESSAGE, 0) if kind in ("send", "recv") else (direction, chunk)
    outputs, inputs = ([] if place is None else _flat(arguments[place]) for place in (wrote, read))
    pairs = [([one], [other]) for one, other in zip(outputs, inputs, strict=True)] if "coalesced" in name else []
    found = []
    for written, given in pairs or [(outputs, inputs)]:
        tensors = [] if kind == "barrier" else given or written
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        elements = sum(tensor.numel() for tensor in tensors)
        sent = Transfer(*pass_, group.group_desc, ranks, kind, dtype, elements, size_of(tensors))
        found.append((sent, written, given))
    return found


def _is_group(x: torch.ScriptObject) -> bool:
    return str(x._type()).endswith("ProcessGroup")


def _flat(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [tensor for part in x for tensor in _flat(part)]


# Of each operation: what it is, and the places of the tensors that it writes and reads among its arguments.
_KINDS: dict[str, tuple[str, int | None, int | None]] = {
    "allreduce_": ("all_reduce", 0, 0),
    "allreduce_coalesced_": ("all_reduce", 0, 0),
    "broadcast_": ("broadcast", 0, 0),
    "reduce_": ("reduce", 0, 0),
    "send": ("send", None, 0),
    "recv_": ("recv", 0, None),
    "allgather_": ("all_gather", 0, 1),
    "_allgather_base_": ("all_gather_into_tensor", 0, 1),
    "allgather_into_tensor_coalesced_": ("all_gather_into_tensor", 0, 1),
    "reduce_scatter_": ("reduce_scatter", 0, 1),
    "_reduce_scatter_base_": ("reduce_scatter_tensor", 0, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter_tensor", 0, 1),
    "alltoall_": ("all_to_all", 0, 1),
    "alltoall_base_": ("all_to_all_single", 0, 1),
    "barrier": ("barrier", 0, 0),
}
