"""What goes wrong on one rank, or in one process, while a checkpoint is written is known to all, and they go on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.parallel.oracle import train_step, training
from tests.parallel.test_layouts import run_tree
from tests.ranks import run_ranks


def killed(*arguments: Any, **named: Any) -> None:
    """In the place of writing a file: as the kernel does where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(*arguments: Any, **named: Any) -> None:
    raise OSError(28, "No space left on device")


def write_elsewhere(write: Any, folder: Path, rank: int, *arguments: Any) -> None:
    """As where the node of rank 1 has another disk under the same name."""
    from jetmoe_megatron.checkpoint.integrity import CHECKSUMS, checksum

    write(*arguments)
    sums = {path.name: checksum(path) for path in folder.glob(f"__{rank}_*")}
    if rank == 1:
        for name in sums:
            (folder / name).unlink()
    else:
        (folder / f"{CHECKSUMS}.{rank}").write_text(json.dumps(sums))


def saves(tree: dict[str, Any], folder: str, where: str) -> tuple[str | None, str | None, float]:
    """Why a save fails while `where` goes wrong, why the next one does, and the loss of a step after both."""
    with training(tree, 1) as (run, model, batches_of_steps):
        from megatron.core.dist_checkpointing import serialization
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        from jetmoe_megatron.checkpoint import store
        from jetmoe_megatron.checkpoint.store import Saver
        from jetmoe_megatron.training.optimizer import build_optimizer

        faults = {
            "writer": patch.object(FileSystemWriterAsync, "write_preloaded_data", killed),
            "metadata": patch.object(FileSystemWriterAsync, "finish", refuse),
            "config": patch.object(serialization, "save_config", refuse),
            "elsewhere": patch.multiple(store, _write_and_sum=write_elsewhere, _SEEN_LATE_SECONDS=0.5),
        }
        optimizer, (batches,) = build_optimizer(run, model), batches_of_steps
        saver = Saver(Path(folder), run, lambda tokens: False)
        with faults[where]:
            saver.save({"tokens": 256, "data": {}}, model, optimizer, wait=True)
        first = saver.failed
        saver.save({"tokens": 512, "data": {}}, model, optimizer, wait=True)
        return first, saver.failed, train_step(model, optimizer, batches, 1e-3)["lm_loss"]


@pytest.mark.parametrize("where", ["writer", "metadata", "config", "elsewhere"])
def test_the_next_save_succeeds(where: str, tmp_path: Path) -> None:
    results = run_ranks(2, saves, run_tree(), str(tmp_path), where)
    for first, second, loss in results:
        assert first is not None and second is None and loss > 0
        if where in ("metadata", "config"):
            assert first.endswith("tokens_256: No space left on device")
        if where == "elsewhere":
            assert "what rank 1 has written is not there: do all nodes see one output_dir?" in first
    assert [path.name for path in tmp_path.iterdir()] == ["tokens_512"]
