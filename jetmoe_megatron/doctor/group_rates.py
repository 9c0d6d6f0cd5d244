"""All-reduce and all-to-all in each group of ranks that the run uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.distributed import ProcessGroup

from jetmoe_megatron.doctor.timing import best_seconds_together
from jetmoe_megatron.runtime.device import device, has_gpu

_BYTES_ON_GPU, _BYTES_ON_CPU = 2**28, 2**22


def group_rates(
    groups: Mapping[str, ProcessGroup | None],
) -> dict[str, Callable[[], tuple[tuple[int, ...], float] | None]]:
    """What to measure, in this order on all ranks.

    Each returns the ranks of the group and bytes/s; None if this rank is in no such group, is alone in it, or has
    measured these ranks before under another name. Bytes are those that each rank sends in a ring, so that groups of
    different sizes have comparable rates (the "bus bandwidth" of nccl-tests).
    """
    seen: set[tuple[str, tuple[int, ...]]] = set()

    def measure(kind: str, group: ProcessGroup | None) -> tuple[tuple[int, ...], float] | None:
        if group is None or group.size() == 1:
            return None
        ranks = tuple(torch.distributed.get_process_group_ranks(group))
        if (kind, ranks) in seen:
            return None
        seen.add((kind, ranks))
        return ranks, _KINDS[kind](group)

    measures = {f"all-reduce, {name}": partial(measure, "all-reduce", group) for name, group in groups.items()}
    name = "expert" if "expert" in groups else "all ranks"  # training exchanges rows in the former
    return {**measures, f"all-to-all, {name}": partial(measure, "all-to-all", groups[name])}


def _all_reduce(group: ProcessGroup) -> float:
    size = _BYTES_ON_GPU if has_gpu() else _BYTES_ON_CPU
    values = torch.zeros(size // 4, device=device())
    seconds = best_seconds_together(lambda: torch.distributed.all_reduce(values, group=group))
    return 2 * size * (group.size() - 1) / group.size() / seconds


def _all_to_all(group: ProcessGroup) -> float:
    ranks = group.size()
    each = (_BYTES_ON_GPU if has_gpu() else _BYTES_ON_CPU) // 4 // ranks
    values = torch.zeros(each * ranks, device=device())
    received = torch.empty_like(values)
    seconds = best_seconds_together(lambda: torch.distributed.all_to_all_single(received, values, group=group))
    return 4 * each * (ranks - 1) / seconds


_KINDS = {"all-reduce": _all_reduce, "all-to-all": _all_to_all}
