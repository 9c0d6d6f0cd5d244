"""Runs a script for `elastic.py` and leaves its exit status in a file.

torch's agent closes all workers of a node when one fails, and may start them again. After an exit status in `DECIDED`
that would lose a checkpoint, or repeat an error, so for the agent such a worker has succeeded.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from data_tools.errors import InputError, one_line
from jetmoe_megatron.errors import ElsewhereError, SharedError, may_pass
from jetmoe_megatron.launch.rank_log import log_into_file
from jetmoe_megatron.launch.script import run_script
from jetmoe_megatron.runtime.failed_nodes import record, this_node
from jetmoe_megatron.stopping import DECIDED, LAUNCHER_FOLDER, OTHERS_FIND_THE_SAME, ExitStatus

_names: list[socket.socket] = []


def begun(folder: Path) -> list[str]:
    """Local ranks that have begun."""
    return list(_left(folder, "begun"))


def ended(folder: Path) -> dict[str, int]:
    """The exit status of each local rank that has ended by itself. One that was killed, or that raised an error, is
    left out."""
    return {rank: int(status) for rank, status in _left(folder, "ended").items()}


def say_wrong(message: str) -> None:
    """Say on stderr what is wrong with the run, once for all ranks of this node that find the same."""
    first_node = os.environ.get("GROUP_RANK", os.environ.get("RANK", "0")) == "0"
    line = f"error: {message}" if first_node else f"{this_node()}: error: {message}"
    if folder := os.environ.get(LAUNCHER_FOLDER):
        with suppress(OSError):
            _leave(Path(folder), "wrong", line)  # for the launcher to say
            return
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        print(line, file=sys.stderr, flush=True)
    elif _is_first_to_say(message):
        print(line, file=sys.stderr, flush=True)
        time.sleep(OTHERS_FIND_THE_SAME)


def _is_first_to_say(message: str) -> bool:
    """Under plain torchrun: the first rank takes a name, an abstract Unix socket, which ends with its process."""
    start = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    name = hashlib.sha256(repr([os.getuid(), *start, message]).encode(errors="surrogateescape")).hexdigest()
    _names.append(socket.socket(socket.AF_UNIX))
    try:
        _names[-1].bind(f"\0jetmoe {name}")
    except OSError:
        return False
    return True


def refuse_to_start(error: InputError | OSError, met: bool) -> ExitStatus:
    """Say what is wrong with the run, also to ranks on other nodes that wait for this one.

    met: whether this rank has joined the others. Before that, no other rank knows the error, except a SharedError.

    Returns:
        The exit status of this rank. With 2 a job does not come back by itself, so an error that may pass gives 1. Then
        this node is named as the one that failed, and ranks that waited for it end with 4.
    """
    message, passes = one_line(error), may_pass(error)
    say_wrong(message)
    elsewhere = int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if elsewhere and not met and not isinstance(error, SharedError):
        from jetmoe_megatron.runtime.meeting import refuse

        refuse(message, passes)
    if isinstance(error, ElsewhereError):
        return ExitStatus.LOST_RANKS
    if passes and not isinstance(error, SharedError):
        record(this_node(), message)
    return ExitStatus.NOT_SAVED if passes else ExitStatus.BAD_INPUT


def said_wrong(folder: Path) -> list[str]:
    """What the ranks have said with `say_wrong`, in the order of time."""
    return list(_left(folder, "wrong").values())


def _left(folder: Path, what: str) -> dict[str, str]:
    """By local rank, in the order of time. A file may vanish, and at the end the folder."""
    found: list[tuple[int, str, str]] = []
    with suppress(FileNotFoundError):
        for file in folder.glob(f"*.{what}"):
            text = file.read_text(encoding="utf-8", errors="surrogateescape")
            found.append((file.stat().st_mtime_ns, file.stem, text))
    return {rank: text for _, rank, text in sorted(found)}


def _leave(folder: Path, what: str, text: str) -> None:
    new = folder / f"{os.environ['LOCAL_RANK']}.new"
    new.write_text(text, encoding="utf-8", errors="surrogateescape")
    new.replace(new.with_suffix(f".{what}"))


def main() -> None:
    """The arguments of the process: those of `run_script`."""
    folder, rank = Path(os.environ[LAUNCHER_FOLDER]), os.environ["LOCAL_RANK"]
    log_into_file()
    (folder / f"{rank}.ended").unlink(missing_ok=True)  # of the worker that this one replaces
    (folder / f"{rank}.begun").touch()
    try:
        run_script()
    except SystemExit as end:
        status = 0 if end.code is None else end.code
        if not isinstance(status, int):
            raise
    else:
        status = 0
    try:
        _leave(folder, "ended", str(int(status)))
    except OSError:  # no room: the agent learns the status, and closes the others of this node
        sys.exit(status)
    sys.exit(0 if status in DECIDED else status)


if __name__ == "__main__":
    main()
