"""The nodes that failed in this start of a job, each a file in a folder that the job's script names. The next start
leaves them out (`launch/job.py`)."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

from jetmoe_megatron.stopping import FAILED_NODES, NODE


def this_node() -> str:
    """The name that the job's script or SLURM knows this node by, or else the name of the host."""
    return os.environ.get(NODE) or os.environ.get("SLURMD_NODENAME") or platform.node()


def record(node: str, reason: str) -> None:
    """The first reason stays. Nothing happens outside a job, or if the folder cannot be written."""
    if folder := os.environ.get(FAILED_NODES):
        with suppress(OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with (Path(folder) / node).open("x", encoding="utf-8") as file:
                file.write(reason)


def recorded(folder: Path) -> dict[str, str]:
    """The reason of each node, by its name."""
    if not folder.is_dir():
        return {}
    return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.iterdir())}
