"""What all ranks must see alike: decided by one of them, refused by all of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import secrets
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
_ROOT = Path(__file__).parents[2]
_PATIENCE_SECONDS = 5.0  # for a run that was just killed to be gone
_RESTART_PATIENCE_SECONDS = 600.0  # the same, where SLURM has lost sight of the node that it runs on
_SEEN_LATE_SECONDS = 30.0  # a network file system may show a new file so much later


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
    """Raises SharedError if a run file, the checkpoint to start from, or the code was another one on some rank."""
    own = hashlib.sha256(dump_run(run).encode()).hexdigest(), _code_digest()
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    for i, what in enumerate(("has read another run than rank 0", "runs other code than rank 0")):
        if other := [str(rank) for rank, its in enumerate(found) if its[i] != found[0][i]]:
            raise SharedError(f"rank {', '.join(other)} of {len(found)} {what}: do all nodes see one file system?")


def _code_digest() -> str:
    """Of this program, torch and Megatron, by their versions."""
    digest = hashlib.sha256(f"{torch.__version__} {importlib.metadata.version('megatron-core')}".encode())
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
    deadline = time.monotonic() + _SEEN_LATE_SECONDS
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, None if mark.exists() else platform.node())
    if torch.distributed.get_rank() == 0:
        mark.unlink(missing_ok=True)
    if blind := sorted({host for host in found if host}):
        raise SharedError(f"output_dir: {folder} on {', '.join(blind)} is not the folder that rank 0 writes to")


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
        restarted = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
        deadline = time.monotonic() + (_RESTART_PATIENCE_SECONDS if restarted else _PATIENCE_SECONDS)
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
