"""The resolved run that lies in a checkpoint. No torch here."""

from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.checkpoint.checksums import CHECKSUMS
from jetmoe_megatron.checkpoint.progress import PROGRESS_FILE
from jetmoe_megatron.config.load import load_sections
from jetmoe_megatron.config.schema import (
    Batch,
    Count,
    Losses,
    Model,
    Optimizer,
    Phase,
    Schedule,
    Section,
)
from jetmoe_megatron.errors import UserError

RUN_FILE = "run.yaml"  # the resolved run
MODEL_FILE = "model.yaml"  # instead of a run, in a checkpoint made of a Hugging Face model, which has weights alone


class SavedRun(Section):
    """Of a saved run what the losses of the steps to come depend on: a run that resumes it must agree."""

    seed: Count
    model: Model
    losses: Losses
    precision: str
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    phases: list[Phase]


def is_of_training(checkpoint: Path) -> bool:
    """Not made of a Hugging Face model. Some of its files may be missing: then its checksums tell."""
    if any((checkpoint / name).exists() for name in (RUN_FILE, PROGRESS_FILE)):
        return True
    return (checkpoint / CHECKSUMS).exists() and not (checkpoint / MODEL_FILE).exists()


def without_checksums(checkpoint: Path) -> str | None:
    """A warning if nobody can tell whether it is whole: `jetmoe convert from-hf` has not always listed its files."""
    if (checkpoint / CHECKSUMS).exists():
        return None
    return f"{checkpoint}: has no {CHECKSUMS}, so that damage in it may not be noticed"


def read_saved_run(checkpoint: Path) -> SavedRun:
    """Raises UserError if the folder is not a published checkpoint."""
    file = checkpoint / RUN_FILE
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint folder")
    if not file.is_file():
        raise UserError(f"{checkpoint}: not a checkpoint of this program: it has no {RUN_FILE}")
    return load_sections(file, SavedRun)
