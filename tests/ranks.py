"""Run a function on several real ranks over gloo, and return what each rank returned."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests import warm


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
    """`function(*arguments)` must be importable; it is called in each rank's process with RANK and WORLD_SIZE set.

    Raises RuntimeError with the first rank's traceback if one fails, TimeoutError if they take too long.
    """
    with TemporaryDirectory() as folder:
        processes = [warm.start(_call, own, folder, function, arguments) for own in warm.rank_environment(ranks)]
        status = warm.wait(processes, timeout)
        for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
            stream.write((Path(folder) / name).read_text(errors="replace"))
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        if errors or status:
            raise RuntimeError(errors[0] if errors else f"a rank ended with status {status}")
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(ranks)]


def _call(own: dict[str, str], folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(own, OMP_NUM_THREADS="1")
    warm.redirect(Path(folder) / "out", Path(folder) / "err")
    try:
        result = function(*arguments)
        (Path(folder) / f"{own['RANK']}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(folder) / f"{own['RANK']}.error").write_text(traceback.format_exc())
        os._exit(1)
