"""Where a run goes on: at its newest checkpoint, or at the beginning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jetmoe_megatron.checkpoint.folder import newest
from jetmoe_megatron.checkpoint.saved_run import read_progress, refuse_other_run
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.blend import Ledger, fingerprint, ledger_of
from jetmoe_megatron.errors import UserError


@dataclass(frozen=True)
class Start:
    checkpoint: Path | None
    tokens: int  # consumed
    ledger: Ledger


def find_start(run: Run) -> Start:
    """Raises UserError with one line if the run may not go on from its newest checkpoint, and says why."""
    folder = RunFolder(run)
    checkpoint = newest(folder.checkpoints)
    blend = fingerprint(run, folder.data_cache)
    if checkpoint is None:
        return Start(None, 0, ledger_of(run, blend, None, None))
    if run.checkpoint.resume == "never":
        raise UserError(f"checkpoint.resume: never, but {checkpoint} exists: choose another output_dir or resume: auto")
    refuse_other_run(checkpoint, run)
    progress = read_progress(checkpoint)
    return Start(checkpoint, progress["tokens"], ledger_of(run, blend, progress["data"], checkpoint))
