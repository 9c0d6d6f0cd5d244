"""How long a rank waits for others in a collective."""

from __future__ import annotations

from datetime import timedelta

import torch


def set_time_limit(minutes: float) -> None:
    """For collectives that begin from now on, in all groups of this rank, Megatron's too."""
    c10d = torch.distributed.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(minutes=minutes), group)
