"""A folder that appears under its name only when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.locks import open_locked
from jetmoe_megatron.checkpoint.folder import check_room
from jetmoe_megatron.errors import UserError

UNFINISHED = ".unfinished"  # a file that marks a folder that may be removed


@contextmanager
def new_folder(path: Path, nbytes: int) -> Iterator[Path]:
    """A folder to write to, renamed to `path` if the block succeeds and removed if it fails.

    Raises:
        UserError: `path` exists, another process is writing it, `path.partial` is a folder that this program did not
            make, the disk has less than `nbytes` free, or writing fails.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; remove it or choose another folder")
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(aside):
            try:
                check_room(aside, nbytes)
                yield aside
                (aside / UNFINISHED).unlink()
                aside.rename(path)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Make a folder and lock a file beside it, and remove what a killed process has left in the folder."""
    beside = folder.with_name(folder.name + ".lock")
    lock = open_locked(beside)
    if lock is None:
        raise UserError(f"{folder}: another process is writing there; wait for it")
    with lock:
        try:
            folder.mkdir(exist_ok=True)
            left = sorted(folder.iterdir())
            if left and folder / UNFINISHED not in left:
                raise UserError(
                    f"{folder}: the name is needed, but this program did not make that folder: move it away"
                )
            (folder / UNFINISHED).touch()
            for path in left:
                if path.name != UNFINISHED:
                    (shutil.rmtree if path.is_dir() else os.remove)(path)
            yield
        finally:
            beside.unlink()
