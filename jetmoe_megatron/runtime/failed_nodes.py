"""The nodes that came to this start of a job, and those that failed: each is a file in a folder that the job's script
names. The next start leaves out those that failed or did not come (`launch/job.py`)."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jetmoe_megatron.stopping import FAILED_NODES, NODE


def this_node() -> str:
    """The name that the job's script or SLURM knows this node by, or else the name of the host."""
    return os.environ.get(NODE) or os.environ.get("SLURMD_NODENAME") or platform.node()


def came() -> None:
    """This node has started what it should."""
    if folder := os.environ.get(FAILED_NODES):
        with suppress(OSError):
            nodes = came_in(Path(folder))
            nodes.mkdir(parents=True, exist_ok=True)
            (nodes / this_node()).touch()


def came_in(folder: Path) -> Path:
    """Where the nodes that came are named. folder: for those that failed."""
    return folder.with_name("nodes_that_came")


def record(node: str, reason: str) -> None:
    """The first reason stays. Nothing happens outside a job, or if the folder cannot be written."""
    if folder := os.environ.get(FAILED_NODES):
        with suppress(OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with (Path(folder) / node).open("x", encoding="utf-8") as file:
                file.write(reason)


def recorded(folder: Path, nodes: Sequence[str]) -> dict[str, str]:
    """The reason of each node that failed, by its name. nodes: of this start; if some came, the others failed."""
    failed = {}
    for file in _seen(folder):
        failed[file.name] = file.read_text(encoding="utf-8", errors="replace")
    if those := {file.name for file in _seen(came_in(folder))}:
        failed |= {node: "it did not start the ranks" for node in nodes if node not in those | failed.keys()}
    return failed


def _seen(folder: Path) -> list[Path]:
    """The files of a folder, also on a network file system, which forgets its own list when something changes here."""
    if not folder.is_dir():
        return []
    with suppress(OSError):
        mark = folder / ".looked"
        mark.touch()
        mark.unlink()
    return sorted(folder.iterdir())
