"""The folders `checkpoints/tokens_<N>` of a run: publishing, setting aside, retention. No tensors here."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"tokens_(\d+)")
_UNFINISHED = "tokens_*.partial-*"
DAMAGED = ".damaged"  # the end of the name of a folder that failed its check


def checkpoint_path(root: Path, tokens: int) -> Path:
    return root / f"tokens_{tokens}"


def tokens_of(path: Path) -> int:
    """Of a published checkpoint."""
    return int(path.name.removeprefix("tokens_"))


def unfinished_path(path: Path) -> Path:
    """Where a checkpoint is written. The name is new each time: a process of a killed run may still be writing."""
    return path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")


def published(root: Path) -> list[Path]:
    """Oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest(root: Path) -> Path | None:
    found = published(root)
    return found[-1] if found else None


def check_room(folder: Path, size: int) -> None:
    """Raises OSError if the file system of `folder` has no room for `size` bytes, or for another file."""
    disk = os.statvfs(folder)
    if disk.f_files and not disk.f_favail:
        raise OSError(errno.ENOSPC, "no file can be made: the file system has no inodes left")
    if size > (free := disk.f_bavail * disk.f_frsize):
        raise OSError(errno.ENOSPC, f"{in_units(size)} are needed, {in_units(free)} are free")


def in_units(size: float) -> str:
    """`1.5 GB`, `300 kB` or `7 bytes`."""
    for unit, in_bytes in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= in_bytes:
            return f"{size / in_bytes:.3g} {unit}"
    return f"{size:.0f} bytes"


def publish(unfinished: Path, path: Path) -> None:
    """Give a whole checkpoint its name, once its files have reached the disk."""
    for file in [*unfinished.iterdir(), unfinished]:
        _sync(file)
    _delete(path)
    unfinished.rename(path)
    _sync(path.parent)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint; it is not deleted."""
    aside = path.with_name(path.name + DAMAGED)
    while aside.exists():
        aside = path.with_name(f"{path.name}{DAMAGED}-{secrets.token_hex(2)}")
    path.rename(aside)
    return aside


def clear_unfinished(root: Path) -> None:
    """Remove what interrupted saves have left."""
    for path in root.glob(_UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)


def retain(root: Path, keep_last: int, is_kept: Callable[[int], bool]) -> None:
    """Keep all checkpoints for whose tokens `is_kept` is true, and the last `keep_last` others. Delete the rest."""
    passing = [path for path in published(root) if not is_kept(tokens_of(path))]
    for path in passing[:-keep_last]:
        _delete(path)


def _delete(path: Path) -> None:
    """Rename it first, so that a kill in between leaves no checkpoint that lacks some of its files."""
    if path.exists():
        aside = unfinished_path(path)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
