"""Read tensors that several ranks hold copies of: each number is read by one rank, which sends it to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed import ProcessGroup

from data_tools.progress import OnProgress
from jetmoe_megatron.checkpoint.saved_tensors import SavedTensors

_SENT_AT_ONCE = 2**25  # bytes


@dataclass(frozen=True)
class Wanted:
    part: ShardedTensor  # names the tensor and the place in it
    numbers_N: Tensor  # to be filled; flat and contiguous
    first: int  # where `numbers_N` begins in the flattened part
    group: ProcessGroup | None  # of the ranks that want the same; None: only this rank


def fill(saved: SavedTensors, wanted: Sequence[Wanted], progress: OnProgress) -> None:
    """Fill all of `wanted`. The ranks of a group give the same parts in the same order.

    progress: gets the bytes of `numbers_N`, filled and in all.

    Raises:
        ValueError, OSError: as `SavedTensors.fill`, on the rank that met it, after all has been sent.
    """
    shared: dict[ProcessGroup, list[Wanted]] = {}
    failed: OSError | ValueError | None = None
    done, total = 0, sum(own.numbers_N.nbytes for own in wanted)
    for own in wanted:
        if own.group is not None and own.group.size() > 1:
            shared.setdefault(own.group, []).append(own)
        else:
            failed = failed or _read(saved, own)
            done += own.numbers_N.nbytes
            progress(done, total)
    for group, copies in shared.items():
        blocks = [block for copy in copies for block in _blocks(copy)]
        for start in range(0, len(blocks), group.size()):
            turn = blocks[start : start + group.size()]  # block i is read by rank i of the group
            if group.rank() < len(turn):
                failed = failed or _read(saved, turn[group.rank()])
            for reader, block in enumerate(turn):
                torch.distributed.broadcast(block.numbers_N.view(torch.uint8), group=group, group_src=reader)
                done += block.numbers_N.nbytes
            progress(done, total)
    if failed:
        raise failed


def _read(saved: SavedTensors, wanted: Wanted) -> OSError | ValueError | None:
    """Returns what went wrong: the others wait for what this rank sends, whatever it is."""
    try:
        saved.fill(wanted.part, wanted.numbers_N, wanted.first)
    except (OSError, ValueError) as error:
        return error
    return None


def _blocks(wanted: Wanted) -> list[Wanted]:
    size = _SENT_AT_ONCE // wanted.numbers_N.element_size()
    return [
        Wanted(wanted.part, numbers_N, wanted.first + i * size, wanted.group)
        for i, numbers_N in enumerate(wanted.numbers_N.split(size))
    ]
