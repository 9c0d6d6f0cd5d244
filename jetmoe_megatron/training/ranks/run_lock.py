"""One run at a time trains into a run folder."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_tools.locks import is_locked, open_locked
from jetmoe_megatron.config.run_folder import LOCK
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0
from jetmoe_megatron.stopping import RESTARTS, RUN_LOCK_IS_FREE, RUN_LOCK_IS_FREE_AFTER_REQUEUE


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a file in `folder` against other runs, if its file system has locks. The lock ends with the process.

    A folder that was created here and is still empty at the end, because the run was refused, is removed.

    Raises:
        SharedError: another process holds the lock, or the folder cannot be made or locked. After a restart it may
            pass: a lost node may hold the lock.
    """
    lock: IO[bytes] | None = None
    made: list[Path] = []

    def claim() -> None:
        nonlocal lock, made
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        restarted = any(os.environ.get(name, "0") not in ("", "0") for name in ("SLURM_RESTART_COUNT", RESTARTS))
        patience = RUN_LOCK_IS_FREE_AFTER_REQUEUE if restarted else RUN_LOCK_IS_FREE
        deadline = time.monotonic() + patience
        while (lock := open_locked(folder / LOCK)) is None:
            if time.monotonic() > deadline and restarted:
                what = f"another process, perhaps on a node that was lost, still trains into it after {patience:g} s"
                raise TimeoutError(errno.ETIMEDOUT, what, str(folder))
            if time.monotonic() > deadline:
                raise _in_use(folder)
            time.sleep(0.2)

    try:
        decided_by_rank_0(claim)
        yield
    finally:
        if lock is not None:
            with lock, contextlib.suppress(OSError):
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()


def check_unclaimed(folder: Path) -> None:
    """Raises UserError if another process holds the lock now. Nothing is made or changed."""
    if is_locked(folder / LOCK):
        raise _in_use(folder)


def _in_use(folder: Path) -> UserError:
    return UserError(f"output_dir: another process is training into {folder}: stop it, or choose another folder")
