"""Runs a script for `elastic.py` and leaves its exit status in a file.

torch's agent closes all workers of a node when one fails, and may start them again. After an exit status in `DECIDED`
that would lose a checkpoint, or repeat an error, so for the agent such a worker has succeeded.
"""

from __future__ import annotations

import os
import platform
import runpy
import sys
from contextlib import suppress
from pathlib import Path

from data_tools.errors import InputError, one_line
from jetmoe_megatron.errors import SharedError
from jetmoe_megatron.stopping import LAUNCHER_FOLDER, ExitStatus

DECIDED = (ExitStatus.BAD_INPUT, ExitStatus.BAD_STEPS, ExitStatus.SICK_RANK, ExitStatus.RUN_ME_AGAIN)


def begun(folder: Path) -> list[str]:
    """Local ranks that have begun."""
    return [file.stem for file in folder.glob("*.begun")]


def ended(folder: Path) -> dict[str, int]:
    """The exit status of each local rank that has ended by itself. One that was killed, or that raised an error, is
    left out."""
    return {file.stem: int(file.read_text()) for file in folder.glob("*.ended")}


def say_wrong(message: str) -> None:
    """Say on stderr what is wrong with the run. Most ranks find the same, which the launcher says once for its node."""
    first_node = os.environ.get("GROUP_RANK", os.environ.get("RANK", "0")) == "0"
    line = f"error: {message}" if first_node else f"{platform.node()}: error: {message}"
    if folder := os.environ.get(LAUNCHER_FOLDER):
        with suppress(OSError):
            _leave(Path(folder), "wrong", line)
            return
    print(line, file=sys.stderr, flush=True)


def refuse_to_start(error: InputError | OSError, met: bool) -> None:
    """Say what is wrong with the run, also to ranks on other nodes that wait for this one.

    met: whether this rank has joined the others. Before that, no other rank knows the error, except a SharedError.
    """
    message = one_line(error)
    say_wrong(message)
    elsewhere = int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if elsewhere and not met and not isinstance(error, SharedError):
        from jetmoe_megatron.runtime.meeting import refuse

        refuse(message)


def said_wrong(folder: Path) -> list[str]:
    """What the ranks have said with `say_wrong`, in the order of time."""
    files = sorted(folder.glob("*.wrong"), key=lambda file: file.stat().st_mtime_ns)
    return [file.read_text(encoding="utf-8", errors="surrogateescape") for file in files]


def _leave(folder: Path, what: str, text: str) -> None:
    new = folder / f"{os.environ['LOCAL_RANK']}.new"
    new.write_text(text, encoding="utf-8", errors="surrogateescape")
    new.replace(new.with_suffix(f".{what}"))


def main() -> None:
    """The arguments of the process: a script, or `-m` and a module, and its arguments."""
    folder, rank = Path(os.environ[LAUNCHER_FOLDER]), os.environ["LOCAL_RANK"]
    (folder / f"{rank}.ended").unlink(missing_ok=True)  # of the worker that this one replaces
    (folder / f"{rank}.begun").touch()
    sys.argv.pop(0)
    try:
        if sys.argv[0] == "-m":
            runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = 0 if end.code is None else end.code
        if not isinstance(status, int):
            raise
    else:
        status = 0
    _leave(folder, "ended", str(int(status)))
    sys.exit(0 if status in DECIDED else status)


if __name__ == "__main__":
    main()
