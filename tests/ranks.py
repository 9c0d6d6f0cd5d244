"""Run a function on several real ranks over gloo, and give back what each returned."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.multiprocessing as mp


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
    """`function(*arguments)` must be importable; it is called in each rank's process with RANK and WORLD_SIZE set.

    Raises RuntimeError with the first rank's traceback if one fails, TimeoutError if they take too long.
    """
    with TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        port = _free_port()
        processes = [
            context.Process(target=_enter, args=(rank, ranks, port, folder, function, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.time() + timeout
        try:
            while any(p.is_alive() for p in processes):
                failed = [p for p in processes if p.exitcode not in (None, 0)]
                if failed or time.time() > deadline:
                    break
                time.sleep(0.05)
        finally:
            late = time.time() > deadline
            for process in processes:
                process.kill() if process.is_alive() and (late or process.exitcode is None) else None
                process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        if errors:
            raise RuntimeError(errors[0])
        if late:
            raise TimeoutError(f"{ranks} ranks took longer than {timeout} s")
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(ranks)]


def _enter(
    rank: int, ranks: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        result = function(*arguments)
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
