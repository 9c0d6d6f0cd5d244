"""Save model, optimizer and progress.

Nothing in training is random (no dropout, no jitter; data order and weights come from the seed and the position), so
there is no random state to keep.

Saving runs beside training: a rank copies to the host what it will write, and a thread writes it. Writing and hashing
leave Python's lock to the training. Megatron-Core forks processes for this (dist_checkpointing/strategies/
filesystem_async.py); they lose the reason of a failure, and a fork shares CUDA's memory. A step or more later the ranks
agree that all is written; then a thread of rank 0 publishes the folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    determine_main_replica_uniform_distribution,
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from data_tools.printing import printable
from data_tools.progress import above
from jetmoe_megatron.checkpoint.checksums import write_checksums
from jetmoe_megatron.checkpoint.common_state import write_common
from jetmoe_megatron.checkpoint.folder import (
    check_room,
    checkpoint_path,
    clear_unfinished,
    publish,
    retain,
    unfinished_path,
)
from jetmoe_megatron.checkpoint.metadata import read_metadata
from jetmoe_megatron.checkpoint.model_state import sharded_model
from jetmoe_megatron.checkpoint.optimizer_state import gather, own_state, sharded, steps_done
from jetmoe_megatron.checkpoint.progress import PROGRESS_FILE
from jetmoe_megatron.checkpoint.saved_run import RUN_FILE
from jetmoe_megatron.checkpoint.tensors_file import TensorsFile, WrittenPiece
from jetmoe_megatron.checkpoint.write_metadata import write_metadata
from jetmoe_megatron.config import dump_run
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.runtime.clock import utc_now
from jetmoe_megatron.runtime.shared_folder import SEEN_LATE_SECONDS

_WRITTEN = "written.json"  # with a rank at its end: what that rank wrote
_ASK_AGAIN_SECONDS = 10.0


class Saver:
    """Saves checkpoints of one run, one at a time. All ranks call its methods together."""

    def __init__(
        self,
        root: Path,
        run: Run,
        is_kept: Callable[[int], bool],
        published: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """
        is_kept: whether the checkpoint at this many tokens stays, whatever keep_last says.
        published: called on rank 0 with each checkpoint that has got its name.
        """
        self.root, self.run, self.is_kept, self.published = root, run, is_kept, published
        self.failed: str | None = None  # why the last save did not succeed
        self._saving: _Saving | None = None  # the save that has not ended
        self._on_rank_0 = torch.distributed.get_rank() == 0
        if self._on_rank_0:
            clear_unfinished(root)

    def save(
        self, progress: dict[str, Any], model: list[DistributedDataParallel], optimizer: MegatronOptimizer, wait: bool
    ) -> None:
        """Begin to save, after the previous save has ended. A failure leaves older checkpoints as they are.

        progress: `tokens` consumed, and all else that `read_progress` must return.
        wait: return only when the checkpoint has its name, or `failed` says why not.
        """
        self.poll(wait=True)
        path = checkpoint_path(self.root, progress["tokens"])
        state, optimizer_state = sharded_model(model), own_state(optimizer)
        state["optimizer"] = sharded(optimizer_state, state)
        aside = self._begin(path, progress, steps_done(optimizer), _bytes(state))
        if aside is None:
            return
        _share_out(state)
        own = [part for part in _tensors(state) if is_main_replica(part.replica_id)]
        for part in own:
            if part.data is not None and not part.data.is_meta:
                part.data = part.data.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        gather(optimizer, optimizer_state, state["optimizer"].values())
        work = _Work(partial(_write, aside, torch.distributed.get_rank(), own))
        self._saving = _Saving(path, work, publish=partial(self._publish, aside, path))
        self.poll(wait=wait or not self.run.checkpoint.asynchronous)

    def poll(self, wait: bool = False) -> None:
        """Go on with a save in which all ranks have done what they do beside the training."""
        while self._saving is not None:
            work = self._saving.work
            if wait:
                work.join(_ASK_AGAIN_SECONDS)  # nobody waits for a slow disk in the reduction, which has a time limit
            state = torch.tensor([work.is_alive(), work.failed is not None], device=torch.cuda.current_device()).int()
            torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX)
            any_alive, any_failed = state.tolist()
            if any_alive:
                if not wait:
                    return
            elif any_failed:
                self._fail(f"{self._saving.path}: {_first_of_ranks(work.failed)}")
            elif self._saving.publish is not None:
                self._saving = _Saving(self._saving.path, _Work(self._saving.publish), None)
            else:
                self._succeed(self._saving.path)

    def _begin(self, path: Path, progress: dict[str, Any], steps: int, size: int) -> Path | None:
        """If there is room, rank 0 makes the folder with everything except the tensors. All ranks get its name."""
        answer: list[Any] = [None, None]
        if self._on_rank_0:
            aside = unfinished_path(path)
            try:
                aside.mkdir(parents=True)
                check_room(aside, size)
                (aside / RUN_FILE).write_text(dump_run(self.run), encoding="utf-8")
                (aside / PROGRESS_FILE).write_text(json.dumps(progress, indent=1), encoding="utf-8")
                write_common(aside, steps)
                answer = [aside, None]
            except OSError as error:
                shutil.rmtree(aside, ignore_errors=True)
                answer = [None, f"{path}: {error.strerror}"]
        torch.distributed.broadcast_object_list(answer)
        if answer[1]:
            self._fail(answer[1])
        return answer[0]

    def _publish(self, aside: Path, path: Path) -> None:
        """In a thread, after all ranks have written. Only rank 0 has something to do."""
        if not self._on_rank_0:
            return
        files = _written(aside, torch.distributed.get_world_size())
        write_metadata(aside, [(file.name, file.pieces) for file in files])
        read_metadata(aside)  # whether the pieces cover all tensors
        write_checksums(aside, {file.name: file.checksum for file in files})
        publish(aside, path)
        retain(self.root, self.run.checkpoint.keep_last, self.is_kept)

    def _succeed(self, path: Path) -> None:
        self.failed = self._saving = None
        if self._on_rank_0:
            above(f"{utc_now()} saved {path}")
            self.published(path)

    def _fail(self, reason: str) -> None:
        self.failed, self._saving = reason, None
        if self._on_rank_0:
            clear_unfinished(self.root)
            above(f"error: this checkpoint was not saved: {reason}", sys.stderr)


class _Work(threading.Thread):
    """Runs beside the training; `failed` says why it did not succeed."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()  # no daemon: torch aborts a process that ends in the middle of its writing
        self.failed: str | None = None
        self._do = work
        self.start()

    def run(self) -> None:
        try:
            self._do()
        except OSError as error:
            self.failed = error.strerror or str(error)
        except Exception as error:
            self.failed = f"{type(error).__name__}: {printable(str(error))}"


@dataclass(frozen=True)
class _Saving:
    path: Path
    work: _Work
    publish: Callable[[], None] | None  # what follows when all ranks' work is done; None if `work` is that


@dataclass(frozen=True)
class _File:
    """What one rank has written."""

    name: str
    checksum: tuple[int, str]
    pieces: list[WrittenPiece]


def _tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    return [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]


def _bytes(state: dict[str, Any]) -> int:
    """The size of the whole checkpoint, all ranks together; what several ranks hold counts once."""
    own = sum(
        part.data.nbytes for part in _tensors(state) if part.data is not None and is_main_replica(part.replica_id)
    )
    total = torch.tensor([own], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total)


def _share_out(state: dict[str, Any]) -> None:
    """Of what several data-parallel ranks hold, each shall write about the same number of bytes."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    shares = determine_main_replica_uniform_distribution(state, group)
    distribute_main_replicas_with_precomputed_distribution(state, group, shares)


def _write(folder: Path, rank: int, parts: list[ShardedTensor]) -> None:
    """In a thread: write this rank's parts, and free each when it is written."""
    with TensorsFile(folder, rank) as file:
        while parts:
            if not threading.main_thread().is_alive():
                return  # training has failed, and the process ends when this thread does: nobody will publish
            part = parts.pop()
            assert part.data is not None
            file.add(part.key, part.global_shape, part.global_offset, part.data[(None,) * part.prepend_axis_num])
            part.data = None
    (folder / f"{_WRITTEN}.{rank}").write_text(json.dumps([file.name, file.checksum, file.pieces]))


def _written(folder: Path, ranks: int) -> list[_File]:
    """What all ranks have written. The files that say so are removed.

    Raises:
        OSError: a file that a rank has written is not there.
    """
    files: list[_File] = []
    deadline = time.monotonic() + SEEN_LATE_SECONDS
    for rank in range(ranks):
        said = folder / f"{_WRITTEN}.{rank}"
        while (found := _read_json(said)) is None:
            if time.monotonic() > deadline:
                raise OSError(0, f"the files of rank {rank} are not there: do all nodes see the same output_dir?")
            time.sleep(0.2)
        name, checksum, pieces = found
        files.append(_File(name, tuple(checksum), [WrittenPiece(*piece) for piece in pieces]))
        if not (folder / name).exists():
            raise OSError(0, f"{name} is not there")
    for rank in range(ranks):
        (folder / f"{_WRITTEN}.{rank}").unlink()
    return files


def _read_json(file: Path) -> Any:
    """None while the file is missing or incomplete."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _first_of_ranks(reason: str | None) -> str:
    """The reason of the first rank that has one. All ranks call it."""
    reasons: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, reason)
    return next(filter(None, reasons))
