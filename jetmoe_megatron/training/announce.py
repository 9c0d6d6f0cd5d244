"""One line for each start of a run: when, where, and from what."""

from __future__ import annotations

import itertools
import os
import platform
from pathlib import Path
from typing import Any

import torch

from jetmoe_megatron.runtime.clock import utc_now


def announce(checkpoint: Path | None, step: int) -> None:
    """All ranks call it. step: the number of steps that are done."""
    hosts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(hosts, platform.node())
    if torch.distributed.get_rank() == 0:
        job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        by = f" by job {job} (restart {restarts})" if job else ""
        begins = f"continues after step {step} from {checkpoint}" if checkpoint else "begins"
        print(f"{utc_now()} training {begins}{by}, {_ranks_of(hosts)}", flush=True)


def _ranks_of(hosts: list[str]) -> str:
    """`ranks 0-7 on a, 8-15 on b`."""
    groups = [(host, list(ranks)) for host, ranks in itertools.groupby(range(len(hosts)), key=hosts.__getitem__)]
    parts = [
        f"{ranks[0]}-{ranks[-1]} on {host}" if len(ranks) > 1 else f"{ranks[0]} on {host}" for host, ranks in groups
    ]
    return ("ranks " if len(hosts) > 1 else "rank ") + ", ".join(parts)
