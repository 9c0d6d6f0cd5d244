"""Each node writes a file of about the size that it writes for a checkpoint, and reads it back."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_tools.atomic import sync
from jetmoe_megatron.config.describe import count_parameters
from jetmoe_megatron.config.schema import Run

_BLOCK = 2**20
_PARTS = 3  # of which the fastest counts


@dataclass(frozen=True)
class DiskRate:
    """`size` in bytes; `written`, up to the fsync, and `read` in bytes/s; or the problem that there was."""

    folder: str
    size: int
    written: float = 0.0
    read: float = 0.0
    problem: str = ""


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest one above it that exists. It may be a file."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def checkpoint_bytes(run: Run) -> int:
    """Of a whole checkpoint: the weights, their fp32 copies if they are bf16, and two fp32 moments."""
    parameters, _ = count_parameters(run.model)
    return parameters * (2 + 4 + 8 if run.precision == "bf16" else 4 + 8)


def measure_disk(folder: Path, size: int) -> DiskRate:
    """The file loses its name as soon as it is open, so that nothing is left behind, whatever ends this process.

    Args:
        folder: if it is not there yet, the nearest one above it is used.
        size: bytes to write in all, one part after the other into the same place.
    """
    folder = nearest_folder(folder)
    blocks = -(-size // (_PARTS * _BLOCK))
    noise = os.urandom(_BLOCK)  # which no file system can compress
    path = folder / f".doctor-{secrets.token_hex(4)}"
    written, read, damaged = [], [], 0
    try:
        with open(path, "x+b") as file:
            path.unlink()
            for _ in range(_PARTS):
                file.seek(0)
                written.append(_write(file, blocks, noise))
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory would be read
                file.seek(0)
                seconds, wrong = _read(file, blocks, noise)
                read.append(seconds)
                damaged += wrong
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        return DiskRate(str(folder), size, problem=error.strerror or str(error))
    part = blocks * _BLOCK
    problem = f"{damaged} MiB were read back with other bytes than were written" if damaged else ""
    return DiskRate(str(folder), _PARTS * part, part / min(written), part / min(read), problem)


def _write(file: IO[bytes], blocks: int, noise: bytes) -> float:
    """Seconds."""
    began = time.perf_counter()
    for number in range(blocks):
        file.write(_block(number, noise))
    sync(file)
    return time.perf_counter() - began


def _read(file: IO[bytes], blocks: int, noise: bytes) -> tuple[float, int]:
    """Seconds, and the number of blocks that are not what was written."""
    damaged = 0
    began = time.perf_counter()
    for number in range(blocks):
        damaged += file.read(_BLOCK) != _block(number, noise)
    return time.perf_counter() - began, damaged


def _block(number: int, noise: bytes) -> bytes:
    """No two are equal."""
    return number.to_bytes(8, "little") + noise[8:]
