"""If one rank or one process fails while a checkpoint is written, all ranks learn of it and continue."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from jetmoe_megatron.checkpoint.folder import check_room, in_units
from tests.parallel.oracle import train_step, training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks


def killed(*arguments: Any, **named: Any) -> None:
    """In the place of writing a file: as the kernel does where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(*arguments: Any, **named: Any) -> None:
    raise OSError(28, "No space left on device")


class NoInodes:
    """No file of such a name can be made any more, in this process and those that it forks."""

    def __init__(self, name: str) -> None:
        self.name, self.real = name, io.open

    def __call__(self, file: Any, *arguments: Any, **named: Any) -> Any:
        if self.name in str(file) and "r" not in str(arguments[:1] or named.get("mode", "r")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return self.real(file, *arguments, **named)


@contextlib.contextmanager
def no_inodes(name: str) -> Iterator[None]:
    failing = NoInodes(name)
    with patch.object(io, "open", failing), patch.object(builtins, "open", failing):
        yield


def write_elsewhere(write: Any, folder: Path, rank: int, *arguments: Any) -> None:
    """As where the node of rank 1 has another disk under the same name."""
    from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, checksum

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

        import jetmoe_megatron.checkpoint.saver as saver_module
        from jetmoe_megatron.checkpoint.saver import Saver
        from jetmoe_megatron.training.optimizer import build_optimizer

        faults: dict[str, contextlib.AbstractContextManager[Any]] = {
            "writer": patch.object(FileSystemWriterAsync, "write_preloaded_data", killed),
            "metadata": patch.object(FileSystemWriterAsync, "finish", refuse),
            "config": patch.object(serialization, "save_config", refuse),
            "no file for the steps": no_inodes("common.pt"),
            "no file for the tensors": no_inodes(".distcp"),
            "no file for the checksums": no_inodes("checksums.json."),
            "elsewhere": patch.multiple(saver_module, _write_and_sum=write_elsewhere, SEEN_LATE_SECONDS=0.5),
        }
        optimizer, (batches,) = build_optimizer(run, model), batches_of_steps
        saver = Saver(Path(folder), run, lambda tokens: False)
        with faults[where]:
            saver.save({"tokens": 256, "data": {}}, model, optimizer, wait=True)
        first = saver.failed
        saver.save({"tokens": 512, "data": {}}, model, optimizer, wait=True)
        return first, saver.failed, train_step(model, optimizer, batches, 1e-3)["lm_loss"]


NO_FILE = ["no file for the steps", "no file for the tensors", "no file for the checksums"]


@pytest.mark.parametrize("where", ["writer", "metadata", "config", "elsewhere", *NO_FILE])
def test_the_next_save_succeeds(where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = run_ranks(2, saves, run_tree(), str(tmp_path), where)
    for first, second, loss in results:
        assert first is not None and second is None and loss > 0
    if where in ("metadata", "config", *NO_FILE):
        assert "No space left on device" in results[0][0]
    if where == "elsewhere":
        assert "the files of rank 1 are not there: do all nodes see the same output_dir?" in results[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens_512"]
    errors = capfd.readouterr().err
    assert errors.count("error: this checkpoint was not saved: ") == 1 and "Traceback" not in errors


def replaced(disk: os.statvfs_result, **fields: int) -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(disk, name) for name in dir(disk) if name.startswith("f_")} | fields)


def test_a_disk_without_room_says_how_much_is_missing(tmp_path: Path) -> None:
    full = os.statvfs(tmp_path)
    few_bytes = patch.object(os, "statvfs", lambda folder: replaced(full, f_bavail=10, f_frsize=70))
    with few_bytes, pytest.raises(OSError, match=r"No space left|2\.5 kB are needed, 700 bytes are free"):
        check_room(tmp_path, 2500)
    no_inodes_left = patch.object(os, "statvfs", lambda folder: replaced(full, f_files=10, f_favail=0))
    with no_inodes_left, pytest.raises(OSError, match="no inodes left"):
        check_room(tmp_path, 0)
    assert [in_units(size) for size in (0, 999, 1500, 2.5e6, 119e9, 3.25e12)] == [
        "0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "119 GB", "3.25 TB",
    ]  # fmt: skip
