"""Do all ranks train the same run? They compare run files, code and the folder they write to before the first step."""

from __future__ import annotations

import hashlib
import platform
import secrets
import time
from pathlib import Path
from typing import Any

import torch

from jetmoe_megatron.config import dump_run
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import SharedError
from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0
from jetmoe_megatron.runtime.shared_folder import SEEN_LATE_SECONDS

_ROOT = Path(__file__).parents[3]


def check_ranks_read_the_same(run: Run) -> None:
    """Raises SharedError if the run file, the checkpoint to start from, or the code is different on some rank."""
    own = run_digest(run), code_digest()
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    for i, what in enumerate(("was given a different run file than rank 0", "runs other code than rank 0")):
        if other := [str(rank) for rank, its in enumerate(found) if its[i] != found[0][i]]:
            raise SharedError(f"rank {', '.join(other)} of {len(found)} {what}: do all nodes see one file system?")


def run_digest(run: Run) -> str:
    """A hash of what the run file says, with all defaults."""
    return hashlib.sha256(dump_run(run).encode()).hexdigest()


def code_digest() -> str:
    """A hash of this program's files. The versions of its packages were compared before (`runtime/machine.py`)."""
    digest = hashlib.sha256()
    for package in ("jetmoe_megatron", "data_tools"):
        for file in sorted((_ROOT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def check_ranks_share(folder: Path) -> None:
    """Raises SharedError if some rank does not see what rank 0 writes into `folder`."""

    def leave_a_mark() -> Path:
        mark = folder / f".seen-by-all-{secrets.token_hex(4)}"
        mark.touch()
        return mark

    mark = decided_by_rank_0(leave_a_mark)
    deadline = time.monotonic() + SEEN_LATE_SECONDS
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, None if mark.exists() else platform.node())
    if torch.distributed.get_rank() == 0:
        mark.unlink(missing_ok=True)
    if blind := sorted({host for host in found if host}):
        raise SharedError(f"output_dir: {folder} on {', '.join(blind)} is not the folder that rank 0 writes to")
