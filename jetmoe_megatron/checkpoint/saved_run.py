"""The resolved run that is saved in a checkpoint. No torch here."""

from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, not_a_file
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
MODEL_FILE = "model.yaml"  # instead of a run, in a checkpoint made from a Hugging Face model, which has only weights


class SavedRun(Section):
    """The parts of a saved run that the losses of later steps depend on: a run that resumes it must agree."""

    seed: Count
    model: Model
    losses: Losses
    precision: str
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    phases: list[Phase]


def is_of_training(checkpoint: Path) -> bool:
    """Whether it was not made from a Hugging Face model. If some of its files are missing, its checksums decide."""
    if any((checkpoint / name).exists() for name in (RUN_FILE, PROGRESS_FILE)):
        return True
    return (checkpoint / CHECKSUMS).exists() and not (checkpoint / MODEL_FILE).exists()


def without_checksums(checkpoint: Path) -> str | None:
    """A warning if damage cannot be detected: `jetmoe convert from-hf` has not always written checksums.

    Raises:
        UserError: something that would be read is not a file. Reading a pipe would block.
    """
    if (checkpoint / CHECKSUMS).exists():
        return None
    if wrong := not_a_file(checkpoint):
        raise UserError(f"{checkpoint}: is damaged: {wrong}")
    return f"{checkpoint}: has no {CHECKSUMS}, so damage in it may not be noticed"


def read_saved_run(checkpoint: Path) -> SavedRun:
    """Raises UserError if the folder is not a published checkpoint."""
    file = checkpoint / RUN_FILE
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint folder")
    if not file.is_file():
        raise UserError(f"{checkpoint}: not a checkpoint of this program: it has no {RUN_FILE}")
    return load_sections(file, SavedRun)
