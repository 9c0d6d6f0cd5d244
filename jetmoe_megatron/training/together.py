"""What all ranks must see alike: decided by one of them, refused by all of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from data_tools.errors import InputError, one_line
from jetmoe_megatron.config import dump_run
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import SharedError, UserError

T = TypeVar("T")
_PATIENCE_SECONDS = 5.0  # for a run that was just killed to be gone


def decided_by_rank_0(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on all ranks: others may see an older state of a network file system.

    Raises:
        SharedError: on all ranks, what was wrong on rank 0.
    """
    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = decide()
        except (InputError, OSError) as error:
            answer[1] = one_line(error)
    torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise SharedError(answer[1])
    return answer[0]


def check_ranks_read_the_same(run: Run) -> None:
    """Raises SharedError if a run file, or the checkpoint to start from, was another one on some rank."""
    digest = hashlib.sha256(dump_run(run).encode()).hexdigest()
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, digest)
    if other := [str(rank) for rank, its in enumerate(found) if its != found[0]]:
        raise SharedError(
            f"rank {', '.join(other)} of {len(found)} has read another run than rank 0: do all nodes see one file?"
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock `folder` against other runs, where its file system has locks. The lock ends with the process.

    A folder that was made here and is still empty at the end, because the run was refused, is removed.

    Raises:
        SharedError: another process holds the lock, or the folder cannot be made.
    """
    lock, made = None, []

    def claim() -> None:
        nonlocal lock, made
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"output_dir: another process is training into {folder}: stop it, or choose another folder"
                    ) from None
                time.sleep(0.2)
            except OSError:  # no locks here
                return None

    try:
        decided_by_rank_0(claim)
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        if lock is not None:
            os.close(lock)
