"""The nodes that came to this start of a job, and those that failed: each is a file in a folder that the job's script
names. The next start leaves out those that failed or did not come (`launch/job.py`)."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jetmoe_megatron.stopping import DECIDED, FAILED_NODES, NODE, ExitStatus

# Exit codes of ranks that only lost another one, by themselves or by NCCL's watchdog, or that a launcher closed.
_FOLLOWED = (ExitStatus.LOST_RANKS, -signal.SIGABRT, -signal.SIGTERM)


def is_to_blame(exit_code: int) -> bool:
    """Whether a rank with this exit code (-N for signal N) may have failed because of its node."""
    return exit_code != ExitStatus.DONE and exit_code not in (*DECIDED, *_FOLLOWED)


def this_node() -> str:
    """The name that the job's script or SLURM knows this node by, or else the name of the host."""
    return os.environ.get(NODE) or os.environ.get("SLURMD_NODENAME") or platform.node()


def how_it_ended(rank: int, exit_code: int) -> str:
    """exit_code: -N for signal N."""
    how = f"was killed by {_name(-exit_code)}" if exit_code < 0 else f"exited with status {exit_code}"
    return f"rank {rank} on {this_node()} {how}"


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # those for real time have none
        return f"signal {signum}"


def came() -> None:
    """This node has started what it should."""
    if folder := os.environ.get(FAILED_NODES):
        with suppress(OSError):
            nodes = came_in(Path(folder))
            nodes.mkdir(parents=True, exist_ok=True)
            (nodes / this_node()).touch()


def stop_asked() -> bool:
    """Whether this start was told to stop before its launchers listened to signals."""
    folder = os.environ.get(FAILED_NODES)
    return folder is not None and Path(folder).with_name("stop").exists()


def came_in(folder: Path) -> Path:
    """Where the nodes that came are named. folder: for those that failed."""
    return folder.with_name("nodes_that_came")


def record(node: str, reason: str, if_first: bool = False) -> None:
    """The first reason stays. Nothing happens outside a job, or if the folder cannot be written.

    if_first: only if no other node has failed.
    """
    if folder := os.environ.get(FAILED_NODES):
        with suppress(OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)
            if if_first and _seen(Path(folder)):
                return
            with (Path(folder) / node).open("x", encoding="utf-8") as file:
                file.write(reason)


def recorded(folder: Path, nodes: Sequence[str]) -> dict[str, str]:
    """The reason of each node that failed, by its name. nodes: of this start; if some came, the others failed."""
    failed = {}
    for file in _seen(folder):
        failed[file.name] = file.read_text(encoding="utf-8", errors="replace").strip()
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
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))
