"""Two ranks send to one another, each rank with its neighbours: a rank that is in every slow pair is slow itself.

A chain is a list of ranks in which neighbours, and the last and the first, form pairs. The pairs of a chain are
measured in rounds, in which each rank is in one pair at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.distributed import P2POp, ProcessGroup

from jetmoe_megatron.doctor.timing import best_seconds_together
from jetmoe_megatron.runtime.device import device, has_gpu

_BYTES_ON_GPU, _BYTES_ON_CPU = 2**28, 2**22


def chains(nodes: Sequence[str]) -> dict[str, list[list[int]]]:
    """nodes: of each rank. Inside a node and between nodes the links have different speeds."""
    on: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        on.setdefault(node, []).append(rank)
    most = max(map(len, on.values()))
    across = [[ranks[place] for ranks in on.values() if place < len(ranks)] for place in range(most)]
    return {"pairs in a node": list(on.values()), "pairs between nodes": across}


def rounds(chain: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Three rounds; some may be empty."""
    pairs = list(itertools.pairwise(chain))
    closing = [(chain[-1], chain[0])] if len(chain) > 2 else []
    if len(chain) % 2:
        return [pairs[::2], pairs[1::2], closing]
    return [pairs[::2], pairs[1::2] + closing, []]


def pair_rates(chains: Sequence[Sequence[int]], group: ProcessGroup | None = None) -> dict[tuple[int, int], float]:
    """Bytes/s in each direction of the pairs that this rank is in. All ranks call it.

    group: whose connections are used; default: that of all ranks.
    """
    rank, measured = torch.distributed.get_rank(), {}
    for number in range(3):
        torch.distributed.barrier()
        for chain in chains:
            for pair in rounds(chain)[number]:
                if rank in pair:
                    measured[pair] = _exchange(pair[0] if rank == pair[1] else pair[1], group)
    return measured


def _exchange(other: int, group: ProcessGroup | None) -> float:
    size = _BYTES_ON_GPU if has_gpu() else _BYTES_ON_CPU
    sent = torch.zeros(size, dtype=torch.uint8, device=device())
    received = torch.empty_like(sent)

    def exchange() -> None:
        operations = [
            P2POp(torch.distributed.isend, sent, other, group),
            P2POp(torch.distributed.irecv, received, other, group),
        ]
        for work in torch.distributed.batch_isend_irecv(operations):
            work.wait()

    return size / best_seconds_together(exchange)
