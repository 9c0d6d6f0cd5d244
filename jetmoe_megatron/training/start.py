"""Where a run goes on: at its newest checkpoint, or at the beginning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetmoe_megatron.checkpoint.folder import newest
from jetmoe_megatron.checkpoint.saved_run import read_progress, refuse_other_run
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.blend import Ledger, fingerprint, ledger_of
from jetmoe_megatron.training.rollback import read_rollback


@dataclass(frozen=True)
class Start:
    checkpoint: Path | None
    tokens: int  # consumed
    ledger: Ledger
    guard: dict[str, Any] | None  # its state


def find_start(run: Run) -> Start:
    """Raises UserError with one line if the run may not go on from its newest checkpoint, and says why."""
    folder = RunFolder(run)
    checkpoint = newest(folder.checkpoints)
    progress: dict[str, Any] = {"tokens": 0}
    if checkpoint is not None:
        refuse_other_run(checkpoint, run)
        progress = read_progress(checkpoint)
    progress |= read_rollback(folder.checkpoints, progress["tokens"])
    saved = progress.get("data")
    ledger = ledger_of(run, fingerprint(run, folder.data_cache), saved, checkpoint or folder.root)
    new_blend = saved and saved["blend"] != ledger.blend  # whose losses are others
    return Start(checkpoint, progress["tokens"], ledger, None if new_blend else progress.get("guard"))
