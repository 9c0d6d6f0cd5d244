"""Where a run continues: at its newest whole checkpoint, at the one that it starts from, or at the beginning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetmoe_megatron.checkpoint.checksums import newest_whole
from jetmoe_megatron.checkpoint.folder import DAMAGED, checkpoint_path
from jetmoe_megatron.checkpoint.progress import read_progress
from jetmoe_megatron.checkpoint.saved_run import is_of_training, read_saved_run
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder, data_cache
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.ledger import Ledger, fingerprint, ledger_of
from jetmoe_megatron.data.mixture import RunSamples
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.resume.may_change import other_keys, refusal
from jetmoe_megatron.resume.rollback import read_rollback
from jetmoe_megatron.resume.start_from import no_whole_steps, source_of


@dataclass(frozen=True)
class StartPoint:
    checkpoint: Path | None
    weights_only: bool  # the checkpoint gives weights only; the optimizer and all else start at zero
    progress: dict[str, Any]  # `tokens` consumed, and what else the checkpoint holds
    ledger: Ledger

    def samples(self, run: Run, cache: IndexCache) -> RunSamples:
        """What is read from there on. Arguments and errors as those of `RunSamples`."""
        # After a rollback, the run reads further, maybe into an epoch that was not prepared. It must not stop there.
        limit = math.inf if self.ledger.rolled_back else run.data.build_limit_tokens
        return RunSamples(run, cache, self.ledger.began, limit)


def find_start_point(
    run: Run, layout: Layout | None = None, find: Callable[[Path], Path | None] = newest_whole
) -> StartPoint:
    """Needs no process group, and by default reads names, sizes and small files only.

    Args:
        layout: messages propose only batch sizes that fit it; None: any size.
        find: gives the newest whole checkpoint of a run.

    Raises:
        UserError: one line that says why the run may not continue from there.
    """
    folder = RunFolder.of(run)
    checkpoint, weights_only, allowed = find(folder.checkpoints), False, run
    progress: dict[str, Any] = {"tokens": 0}
    refusals: list[str] = []
    others: dict[str, str] = {}
    if checkpoint is not None:
        if others := other_keys(read_saved_run(checkpoint), run):
            refusals.append(refusal(checkpoint, others, run))
        progress = read_progress(checkpoint)
        if checkpoint != checkpoint_path(folder.checkpoints, progress["tokens"]):
            raise UserError(
                f"{checkpoint}: holds what was saved at {progress['tokens']} tokens: was it copied or renamed?"
            )
    elif left := sorted(folder.checkpoints.glob(f"tokens_*{DAMAGED}*")):
        raise none_left(left[-1])
    elif run.start_from is not None:
        checkpoint = source_of(run.start_from)
        weights_only = not is_of_training(checkpoint)
        if not weights_only:
            progress = read_progress(checkpoint)
            progress = {key: progress[key] for key in ("tokens", "data")} | {"branched_at": progress["tokens"]}
            allowed = run.model_copy(update={"data": run.data.model_copy(update={"new_blend": True})})
    if checkpoint and (problem := no_whole_steps(run, progress["tokens"], layout)):
        refusals.append(f"{checkpoint}: {problem}")
    progress |= read_rollback(folder, progress["tokens"])
    saved = progress.get("data")
    try:
        where, told = checkpoint or folder.root, {key.rpartition(".")[2] for key in others}
        ledger = ledger_of(allowed, fingerprint(run, data_cache(run)), saved, where, told)
    except UserError as error:
        refusals.append(str(error))
    if refusals:  # all at once; each names the option that permits it
        raise UserError("; ".join(refusals))
    if saved and saved["blend"] != ledger.blend:  # the guard's window holds losses of the old blend
        progress.pop("guard", None)
    return StartPoint(checkpoint, weights_only, progress, ledger)


def none_left(damaged: Path) -> UserError:
    return UserError(
        f"{damaged}: is damaged, and no whole checkpoint is left: restore one, or start from the beginning in another "
        "output_dir"
    )
