"""Weights & Biases: the content of metrics.jsonl, under the same names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.monitor.monitor import Record


class WeightsAndBiases:
    def __init__(self, run: Run, folder: Path) -> None:
        import wandb  # an optional package: training/preflight.py has checked that it is installed

        self.run = wandb.init(
            project=run.logging.wandb_project,
            name=run.name,
            id=_run_id(run),
            resume="allow",
            mode=run.logging.wandb,  # type: ignore[arg-type]
            dir=str(folder),
            config=run.model_dump(),
        )

    def write(self, record: Record) -> None:
        self.run.log(record, step=int(record["step"]))

    def amend(self, step: int, values: Record) -> None:
        self.run.log(values, step=step + 1)  # wandb takes no values for a past step

    def close(self) -> None:
        self.run.finish()


def _run_id(run: Run) -> str:
    """The same for the same run folder, so that a resumed run continues its own charts."""
    digest = hashlib.sha256(str(Path(run.output_dir).resolve()).encode()).hexdigest()
    return f"{''.join(c if c.isalnum() else '-' for c in run.name)[:40]}-{digest[:8]}"
