"""What lies in a checkpoint beside the tensors: the resolved run and its progress. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from jetmoe_megatron.checkpoint.integrity import CHECKSUMS
from jetmoe_megatron.config.load import load_sections
from jetmoe_megatron.config.schema import Batch, Count, Losses, Model, Optimizer, Phase, Run, Schedule, Section
from jetmoe_megatron.errors import UserError

RUN_FILE = "run.yaml"  # the resolved run
MODEL_FILE = "model.yaml"  # instead of a run, in a checkpoint made of a Hugging Face model, which has weights alone
PROGRESS_FILE = "progress.json"  # consumed tokens, and what else a resumed run must know
_NEVER = ("seed", "model", "precision", "batch")  # no option permits these: the position would mean something else


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


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Position(_Saved):
    """data.mixture.Position"""

    sample: Count
    sequences: dict[str, Count]


class _Blend(_Saved):
    model_config = ConfigDict(extra="allow")

    content: dict[str, str]


class _Ledger(_Saved):
    """data.ledger.Ledger"""

    blend: _Blend
    began: _Position
    read: _Position
    past: list[dict[str, Any]]


class _Guard(_Saved):
    """training.guard.Guard"""

    phase: str
    losses: list[float]
    log_norms: list[float]
    bad: list[int]


class Note(_Saved):
    """What a rollback leaves for a resume to use instead of the checkpoint's."""

    data: _Ledger
    guard: _Guard | None = None


class Progress(Note):
    """What `progress.json` holds."""

    tokens: Count  # consumed
    branched_at: Count = 0  # of them, by the run that this one started from


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


def other_run(path: Path, run: Run, sections: Iterable[str] = SavedRun.model_fields) -> str | None:
    """All keys in which `run` differs from the run saved in `path` and may not, and what to do; None if there are none.

    Raises:
        UserError: the saved run cannot be read.
    """
    saved, now = read_saved_run(path).model_dump(), run.model_dump()
    found = [line for section in sections for line in _differences(section, saved[section], now[section])]
    permitted = tuple(run.checkpoint.may_change)
    refused = [(key, text) for key, text in found if _under(key, _NEVER) or not _under(key, permitted)]
    if not refused:
        return None
    fixed = [key for key, _ in refused if _under(key, _NEVER)]
    way = (
        "start another run from it with start_from and its own output_dir"
        if fixed
        else f"permit it with checkpoint.may_change=[{','.join(key for key, _ in refused)}]"
    )
    return f"{path}: differs from the saved run in {'; '.join(text for _, text in refused)}. Set it back, or {way}"


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What `Progress` has, as far as it was saved. Raises UserError if the file is missing or damaged."""
    file = checkpoint / PROGRESS_FILE
    try:
        return Progress.model_validate_json(file.read_bytes()).model_dump(exclude_unset=True)
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{file}: missing or damaged, so that the checkpoint cannot be resumed from ({in_short(error)})"
        ) from None


def in_short(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return str(error.strerror)
    problem = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _differences(key: str, saved: Any, now: Any) -> list[tuple[str, str]]:
    """(key, what it was and is) of each value that differs."""
    # How the work is split and computed may change; what is computed may not. Data has its own fingerprint.
    if key in {"model.expert_backend", "batch.micro_sequences"} or key.endswith(".data"):
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        return [found for name in now for found in _differences(f"{key}.{name}", saved.get(name), now[name])]
    if isinstance(saved, list) and isinstance(now, list):
        entries = enumerate(zip(saved, now, strict=False))
        found = [difference for i, pair in entries for difference in _differences(f"{key}.{i}", *pair)]
        lengths = f"{key} (saved {len(saved)} of them, now {len(now)})"
        return found + ([] if len(saved) == len(now) else [(key, lengths)])
    return [] if saved == now else [(key, f"{key} (saved {saved!r}, now {now!r})")]


def read_saved_run(checkpoint: Path) -> SavedRun:
    """Raises UserError if the folder is not a published checkpoint."""
    file = checkpoint / RUN_FILE
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint folder")
    if not file.is_file():
        raise UserError(f"{checkpoint}: not a checkpoint of this program: it has no {RUN_FILE}")
    return load_sections(file, SavedRun)
