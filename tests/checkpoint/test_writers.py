"""If one rank or one thread fails while a checkpoint is written, all ranks learn of it and continue."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from jetmoe_megatron.checkpoint.folder import check_room, in_units
from tests.parallel.oracle import train_step, training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks
from tests.support import command, small_run


def refuse(*arguments: Any, **named: Any) -> None:
    raise OSError(28, "No space left on device")


class NoInodes:
    """No file of such a name can be made any more, in any thread."""

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


def broken(*arguments: Any) -> None:
    raise RuntimeError("a bug\nof ours")


def write_elsewhere(write: Any, folder: Path, rank: int, parts: list[Any]) -> None:
    """As where the node of rank 1 has another disk under the same name."""
    if rank == 1:
        folder = folder.parent / "another disk"
        folder.mkdir()
    write(folder, rank, parts)


def lose_a_file(write: Any, folder: Path, rank: int, parts: list[Any]) -> None:
    """As where a file system loses a file."""
    write(folder, rank, parts)
    if rank == 1:
        (folder / f"__{rank}_0.distcp").unlink()


def lose_a_piece(write: Any, folder: Path, rank: int, parts: list[Any]) -> None:
    """As where the ranks have not shared out all."""
    write(folder, rank, parts[rank:])


def saves(tree: dict[str, Any], folder: str, where: str) -> tuple[str | None, str | None, float]:
    """Why a save fails while `where` goes wrong, why the next one does, and the loss of a step after both."""
    with training(tree, 1) as (run, model, batches_of_steps):
        import jetmoe_megatron.checkpoint.saver as saver_module
        from jetmoe_megatron.checkpoint.saver import Saver
        from jetmoe_megatron.training.optimizer import build_optimizer

        write = saver_module._write
        faults: dict[str, contextlib.AbstractContextManager[Any]] = {
            "metadata": patch.object(saver_module, "write_metadata", refuse),
            "name": patch.object(saver_module, "publish", refuse),
            "no file for the steps": no_inodes("common.pt"),
            "no file for the tensors": no_inodes(".distcp"),
            "no file for what a rank wrote": no_inodes("written.json."),
            "elsewhere": patch.multiple(saver_module, _write=partial(write_elsewhere, write), SEEN_LATE_SECONDS=0.5),
            "lost": patch.object(saver_module, "_write", partial(lose_a_file, write)),
            "not all": patch.object(saver_module, "_write", partial(lose_a_piece, write)),
            "bug": patch.object(saver_module, "_write", broken),
        }
        optimizer, (batches,) = build_optimizer(run, model), batches_of_steps
        saver = Saver(Path(folder), run, lambda tokens: False)
        with faults[where]:
            saver.save({"tokens": 256, "data": {}}, model, optimizer, wait=True)
        first = saver.failed
        saver.save({"tokens": 512, "data": {}}, model, optimizer, wait=True)
        return first, saver.failed, train_step(model, optimizer, batches, 1e-3)["lm_loss"]


NO_ROOM = ["metadata", "name", "no file for the steps", "no file for the tensors", "no file for what a rank wrote"]
REASONS = {
    **dict.fromkeys(NO_ROOM, "No space left on device"),
    "elsewhere": "the files of rank 1 are not there: do all nodes see the same output_dir?",
    "lost": "__1_0.distcp is not there",
    "not all": "are missing, or occur twice",
    "bug": r"RuntimeError: a bug\nof ours",
}


@pytest.mark.parametrize("where", REASONS)
def test_the_next_save_succeeds(where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = run_ranks(2, saves, run_tree(), str(tmp_path), where)
    for first, second, loss in results:
        assert first is not None and REASONS[where] in first and second is None and loss > 0
    assert {path.name for path in tmp_path.iterdir()} - {"another disk"} == {"tokens_512"}
    errors = capfd.readouterr().err
    assert errors.count("error: this checkpoint was not saved: ") == 1 and "Traceback" not in errors


def trains_while_the_disk_hangs(tree: dict[str, Any], folder: str) -> tuple[float, list[str], Tensor, Tensor]:
    """The loss of a step in between, what is saved then, a weight of the model at the save, and what was saved."""
    with training(tree, 1) as (run, model, batches_of_steps):
        import jetmoe_megatron.checkpoint.saver as saver_module
        from jetmoe_megatron.checkpoint.load import load_weights
        from jetmoe_megatron.training.optimizer import build_optimizer

        optimizer, (batches,) = build_optimizer(run, model), batches_of_steps
        saver = saver_module.Saver(Path(folder), run, lambda tokens: False)
        goes_on, write = threading.Event(), saver_module._write
        with patch.object(saver_module, "_write", lambda *arguments: goes_on.wait() and write(*arguments)):
            saver.save({"tokens": 256, "data": {}}, model, optimizer, wait=False)
        weight = next(model[0].parameters())
        before = weight.detach().clone()
        loss = train_step(model, optimizer, batches, 1e-3)["lm_loss"]
        saver.poll()
        published = [path.name for path in Path(folder).glob("tokens_256")]
        assert not torch.equal(before, weight)
        goes_on.set()
        saver.poll(wait=True)
        load_weights(Path(folder) / "tokens_256", model, optimizer)
        return loss, published, before, weight.detach().clone()


def test_training_goes_on_while_a_disk_hangs(tmp_path: Path) -> None:
    for loss, published, before, saved in run_ranks(2, trains_while_the_disk_hangs, run_tree(), str(tmp_path)):
        assert loss > 0 and published == [] and torch.equal(before, saved)


WRITES_FOR_MINUTES = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
import jetmoe_megatron.checkpoint.saver as saver
saver.TensorsFile.add = lambda *arguments: time.sleep(0.5)
part = dict(key="w", global_shape=(1,), global_offset=(0,), prepend_axis_num=0, data=torch.zeros(1))
parts = [SimpleNamespace(**part) for _ in range(200)]
saver._Work(lambda: saver._write(Path(sys.argv[1]), 0, parts))
raise SystemExit(4)
"""


def test_a_rank_that_fails_does_not_write_to_the_end(tmp_path: Path) -> None:
    """Nobody would publish it, and the launcher learns of the failure only when the process has ended."""
    ended = command(sys.executable, "-c", WRITES_FOR_MINUTES, tmp_path, timeout=60)
    assert ended.returncode == 4 and not ended.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["__0_0.distcp"]


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


def saving_slowly(folder: str, data: dict[str, str]) -> str | None:
    """Rank 1 writes for longer than a rank waits for another."""
    from jetmoe_megatron.checkpoint import saver
    from jetmoe_megatron.config import Run
    from jetmoe_megatron.runtime.device import process_group
    from jetmoe_megatron.runtime.time_limits import set_time_limit

    with process_group(), patch.object(saver, "_ASK_AGAIN_SECONDS", 0.2):
        own = saver.Saver(Path(folder), Run.model_validate(small_run(Path(folder), data)), lambda tokens: True)
        set_time_limit(0.03)
        writing = saver._Work(lambda: time.sleep(4 if os.environ["RANK"] == "1" else 0))
        own._saving = saver._Saving(Path(folder), writing, None)
        own.poll(wait=True)
        return own.failed


def test_a_slow_writer_is_waited_for(tmp_path: Path, data: dict[str, str]) -> None:
    assert run_ranks(2, saving_slowly, str(tmp_path), data) == [None, None]
