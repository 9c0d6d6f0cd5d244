"""Runs a script for `elastic.py` and leaves its exit status in a file.

torch's agent closes all workers of a node when one fails, and may start them again. After an exit status in `DECIDED`
that would lose a checkpoint, or repeat an error, so for the agent such a worker has succeeded.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from jetmoe_megatron.stopping import LAUNCHER_FOLDER, ExitStatus

DECIDED = (ExitStatus.BAD_INPUT, ExitStatus.BAD_STEPS, ExitStatus.RUN_ME_AGAIN)


def begun(folder: Path) -> list[str]:
    """Local ranks that have begun."""
    return [file.stem for file in folder.glob("*.begun")]


def ended(folder: Path) -> dict[str, int]:
    """The exit status of each local rank that has ended by itself. One that was killed, or that raised an error, is
    left out."""
    return {file.stem: int(file.read_text()) for file in folder.glob("*.ended")}


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
    new = folder / f"{rank}.new"
    new.write_text(str(int(status)))
    new.replace(folder / f"{rank}.ended")
    sys.exit(0 if status in DECIDED else status)


if __name__ == "__main__":
    main()
