"""How far a run had come at a checkpoint: `progress.json`. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from jetmoe_megatron.config.schema import Count, Positive
from jetmoe_megatron.errors import UserError

PROGRESS_FILE = "progress.json"  # consumed tokens, and what else a resumed run must know


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Position(_Saved):
    """data.mixture.Position"""

    sample: Count
    sequences: dict[str, Count]


class _Blend(_Saved):
    model_config = ConfigDict(extra="allow")

    content: dict[str, str]
    sequence_length: Positive


class _Ended(BaseModel):
    """A ledger that ended, and what data.ledger keeps with it."""

    model_config = ConfigDict(extra="allow", strict=True)

    blend: _Blend


class _Ledger(_Saved):
    """data.ledger.Ledger"""

    blend: _Blend
    began: _Position
    read: _Position
    past: list[_Ended]

    @model_validator(mode="after")
    def _in_order(self) -> _Ledger:
        before, after = self.began.sequences, self.read.sequences
        if self.began.sample > self.read.sample or any(count > after.get(name, 0) for name, count in before.items()):
            raise ValueError("it began after what was read")
        return self

    @property
    def tokens(self) -> int:
        """Consumed tokens of the run at the position of this ledger."""
        return self.read.sample * self.blend.sequence_length


class _Guard(_Saved):
    """training.loss_guard.Guard"""

    phase: str
    losses: list[float]
    log_norms: list[float]
    bad: list[int]


class Note(_Saved):
    """What a rollback saves; a resume uses it instead of the checkpoint's own."""

    data: _Ledger
    guard: _Guard | None = None


class Progress(Note):
    """What `progress.json` holds."""

    tokens: Count  # consumed
    branched_at: Count = 0  # of them, by the run that this one started from

    @model_validator(mode="after")
    def _at_one_place(self) -> Progress:
        if self.data.tokens != self.tokens:
            raise ValueError(f"its data are at {self.data.tokens} tokens, the run at {self.tokens}")
        return self


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """The fields of `Progress` that were saved. Raises UserError if the file is missing or damaged."""
    file = checkpoint / PROGRESS_FILE
    try:
        return Progress.model_validate_json(file.read_bytes()).model_dump(exclude_unset=True)
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{file}: missing or damaged, so no run can resume from this checkpoint ({first_problem(error)})"
        ) from None


def first_problem(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return str(error.strerror)
    problem = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
