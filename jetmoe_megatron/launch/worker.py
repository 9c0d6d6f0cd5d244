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

from jetmoe_megatron.stopping import LAUNCHER_FOLDER, ExitStatus

DECIDED = (ExitStatus.BAD_INPUT, ExitStatus.BAD_STEPS, ExitStatus.RUN_ME_AGAIN)


def begun(folder: Path) -> list[str]:
    """Local ranks that have begun."""
    return list(_left(folder, "begun"))


def ended(folder: Path) -> dict[str, int]:
    """The exit status of each local rank that has ended by itself. One that was killed, or that raised an error, is
    left out."""
    return {rank: int(status) for rank, status in _left(folder, "ended").items()}


def say_wrong(message: str) -> None:
    """Say on stderr what is wrong with the run. Most ranks find the same, which the launcher says once for its node."""
    first_node = os.environ.get("GROUP_RANK", os.environ.get("RANK", "0")) == "0"
    line = f"error: {message}" if first_node else f"{platform.node()}: error: {message}"
    if folder := os.environ.get(LAUNCHER_FOLDER):
        with suppress(OSError):
            _leave(Path(folder), "wrong", line)
            return
    print(line, file=sys.stderr, flush=True)


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
    try:
        _leave(folder, "ended", str(int(status)))
    except OSError:  # no room: the agent learns the status, and closes the others of this node
        sys.exit(status)
    sys.exit(0 if status in DECIDED else status)


if __name__ == "__main__":
    main()
