"""Save model, optimizer and progress through megatron.core.dist_checkpointing.

Nothing in training is random (no dropout, no jitter; data order and weights come from the seed and the position), so
there is no random state to keep.

Saving runs beside training: tensors are copied to the host if they are not there, and a forked process writes them and
computes checksums. A step or more later the ranks agree that all is written, and the folder gets its name.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from jetmoe_megatron.checkpoint import handover
from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, checksum, write_checksums
from jetmoe_megatron.checkpoint.common_state import leave_common_to_us, write_common
from jetmoe_megatron.checkpoint.folder import (
    check_room,
    checkpoint_path,
    clear_unfinished,
    publish,
    retain,
    unfinished_path,
)
from jetmoe_megatron.checkpoint.load_state import reason_of
from jetmoe_megatron.checkpoint.metadata import read_metadata
from jetmoe_megatron.checkpoint.model_state import sharded_model
from jetmoe_megatron.checkpoint.optimizer_state import gather, own_state, sharded, steps_done
from jetmoe_megatron.checkpoint.progress import PROGRESS_FILE
from jetmoe_megatron.checkpoint.saved_run import RUN_FILE
from jetmoe_megatron.config import dump_run
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.runtime.clock import utc_now
from jetmoe_megatron.runtime.shared_folder import SEEN_LATE_SECONDS


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
        self._queue = AsyncCallsQueue()
        leave_common_to_us()
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
        handover.renew()
        strategy = get_default_save_sharded_strategy()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        FullyParallelSaveStrategyWrapper(strategy, group).apply_saving_parallelization(state)
        gather(optimizer, optimizer_state, state["optimizer"].values())
        request = dist_checkpointing.save(state, str(aside), strategy, async_sharded_save=True)
        if request.async_fn is not None:
            rank = torch.distributed.get_rank()
            request = request._replace(async_fn=partial(_write_and_sum, request.async_fn, aside, rank))
        # These run on rank 0 only: if one of them fails, the other ranks must be released.
        metadata, config = request.finalize_fns
        own: list[str] = []
        request.finalize_fns[:] = [
            partial(_try, own, metadata, partial(torch.distributed.broadcast, _no_failure(), src=0)),
            partial(_try, own, config, torch.distributed.barrier),
            partial(self._publish, aside, path, own),
        ]
        self._queue.schedule_async_request(request)
        self.poll(wait=wait or not self.run.checkpoint.asynchronous)

    def poll(self, wait: bool = False) -> None:
        """Publish a checkpoint whose files all ranks have written."""
        if not self._queue.get_num_unfinalized_calls():
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=wait)
        except (Exception, CheckpointException) as error:  # raised on all ranks if a writer of any rank failed
            self._fail(reason_of(error))

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

    def _publish(self, aside: Path, path: Path, failed: list[str]) -> None:
        """Called on all ranks, after Megatron has written its metadata or failed to."""
        answer: list[Any] = [f"{path}: {failed[0]}" if failed else None]
        if self._on_rank_0 and not failed:
            try:
                _collect_checksums(aside)
                publish(aside, path)
                retain(self.root, self.run.checkpoint.keep_last, self.is_kept)
            except (OSError, ValueError) as error:
                answer = [f"{path}: {getattr(error, 'strerror', error)}"]
        torch.distributed.broadcast_object_list(answer)
        if answer[0]:
            self._fail(answer[0])
            return
        self.failed = None
        if self._on_rank_0:
            print(f"{utc_now()} saved {path}", flush=True)
            self.published(path)

    def _fail(self, reason: str) -> None:
        self.failed = reason
        if self._on_rank_0:
            clear_unfinished(self.root)
            print(f"error: this checkpoint was not saved: {reason}", file=sys.stderr, flush=True)


def _bytes(state: dict[str, Any]) -> int:
    """The size of the whole checkpoint, all ranks together; what several ranks hold counts once."""
    tensors = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
    own = sum(tensor.data.nbytes for tensor in tensors if is_main_replica(tensor.replica_id))
    total = torch.tensor([own], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total)


def _write_and_sum(write: Callable[..., None], folder: Path, rank: int, *arguments: Any) -> None:
    """In the writing process: write, and compute checksums while the files of this rank are in the page cache.

    arguments: those of `write`. The last one is the queue that takes its results, or its exception.
    """
    *usual, results = arguments
    own: queue.SimpleQueue[Any] = queue.SimpleQueue()
    signal.signal(signal.SIGCHLD, _end_with_a_killed_child)
    write(*usual, own)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    outcome = own.get()
    try:
        sums = {path.name: checksum(path) for path in folder.glob(f"__{rank}_*.distcp")}
        (folder / f"{CHECKSUMS}.{rank}").write_text(json.dumps(sums))
    except OSError as error:
        outcome = outcome if isinstance(outcome, Exception) else error
    results.put(outcome)


def _end_with_a_killed_child(*signal_and_frame: Any) -> None:
    """Megatron's writer would wait forever for a child that was killed, for example for lack of memory."""
    for child in psutil.Process().children():
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended and ended.si_code != os.CLD_EXITED:
            os._exit(1)


def _try(failed: list[str], finalize: Callable[[], None], join: Callable[[], Any]) -> None:
    """Run `finalize`. If the disk refuses, run `join`, the collective that the other ranks have reached meanwhile."""
    try:
        finalize()
    except OSError as error:
        failed.append(str(error.strerror))
        join()


def _no_failure() -> torch.Tensor:
    """As in state_dict_saver.save_state_dict_async_finalize: no rank failed to write its part."""
    return torch.zeros(1, dtype=torch.int, device=torch.cuda.current_device())


def _collect_checksums(folder: Path) -> None:
    """
    Raises:
        OSError: a file that a rank has written is not there.
        ValueError: `.metadata` is not what Megatron writes.
    """
    written = {place.relative_path for place in read_metadata(folder).storage_data.values()}
    sums: dict[str, Any] = {}
    deadline = time.monotonic() + SEEN_LATE_SECONDS
    for rank in sorted({name.split("_")[2] for name in written}):  # __<rank>_<number>.distcp
        part = folder / f"{CHECKSUMS}.{rank}"
        while (own := _read_json(part)) is None:
            if time.monotonic() > deadline:
                raise OSError(0, f"the files of rank {rank} are not there: do all nodes see the same output_dir?")
            time.sleep(0.2)
        sums |= own
    for part in folder.glob(f"{CHECKSUMS}.*"):
        os.remove(part)
    if lost := written - sums.keys():
        raise OSError(0, f"{min(lost)} is not there")
    write_checksums(folder, sums)


def _read_json(file: Path) -> Any:
    """None while the file is missing or incomplete."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
