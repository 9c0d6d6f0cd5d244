"""What lies in a checkpoint beside the tensors: the resolved run and its progress. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from jetmoe_megatron.checkpoint.checksums import CHECKSUMS
from jetmoe_megatron.config.load import load_sections
from jetmoe_megatron.config.schema import (
    Batch,
    Count,
    Losses,
    Model,
    Optimizer,
    Phase,
    Positive,
    Run,
    Schedule,
    Section,
)
from jetmoe_megatron.errors import UserError

RUN_FILE = "run.yaml"  # the resolved run
MODEL_FILE = "model.yaml"  # instead of a run, in a checkpoint made of a Hugging Face model, which has weights alone
PROGRESS_FILE = "progress.json"  # consumed tokens, and what else a resumed run must know


class _Way(IntEnum):
    """How a run gets another value of a key than a checkpoint has: a later one serves for the keys of the earlier."""

    NOTHING = 0  # the losses to come do not depend on it
    OPTION = 1  # checkpoint.may_change
    BRANCH = 2  # a run of its own that starts from the checkpoint: the position in the data means something else
    WEIGHTS = 3  # a run of its own that starts from the weights alone
    NEW = 4  # none: it is another model


# Of a key the longest beginning that is here counts.
_WAYS = {
    "seed": _Way.BRANCH,
    "model": _Way.NEW,
    "model.init_std": _Way.NOTHING,
    "model.expert_backend": _Way.NOTHING,
    "model.rope_theta": _Way.WEIGHTS,
    "model.norm_eps": _Way.WEIGHTS,
    "model.top_k": _Way.WEIGHTS,
    "losses": _Way.OPTION,
    "precision": _Way.WEIGHTS,
    "batch": _Way.BRANCH,
    "batch.micro_sequences": _Way.NOTHING,
    "optimizer": _Way.OPTION,
    "schedule": _Way.OPTION,
    "phases": _Way.OPTION,
}


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
        """Of the run, where this ledger is."""
        return self.read.sample * self.blend.sequence_length


class _Guard(_Saved):
    """training.loss_guard.Guard"""

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

    @model_validator(mode="after")
    def _at_one_place(self) -> Progress:
        if self.data.tokens != self.tokens:
            raise ValueError(f"its data are at {self.data.tokens} tokens, the run at {self.tokens}")
        return self


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


def other_keys(saved: Section, run: Run, sections: Iterable[str] = SavedRun.model_fields) -> dict[str, str]:
    """Each key in which `run` differs from what was saved and may not, with what it was and is."""
    now, permitted = run.model_dump(), tuple(run.checkpoint.may_change)
    before = saved.model_dump()
    found = [pair for section in sections for pair in _differences(section, before[section], now[section])]
    return {key: text for key, text in found if _way(key) > _Way.OPTION or not _under(key, permitted)}


def refusal(checkpoint: Path, others: dict[str, str], run: Run) -> str:
    """One line for what `other_keys` found: all of it, and what to do, which the next command accepts."""
    way = max(map(_way, others))
    if way is _Way.OPTION:
        advice = f"permit it with checkpoint.may_change=[{','.join(others)}]"
    elif way is _Way.BRANCH:
        advice = f"begin another run there: start_from={checkpoint}{_in_its_phase(run)} with its own output_dir"
    elif way is _Way.WEIGHTS:
        advice = (
            f"begin another run with the weights alone: `jetmoe convert to-hf {checkpoint} HF`, `jetmoe convert "
            "from-hf HF WEIGHTS`, then start_from=WEIGHTS, without phase and with its own output_dir"
        )
    else:
        advice = "train this other model from its beginning: without start_from, and with its own output_dir"
    return f"{checkpoint}: differs from the saved run in {'; '.join(others.values())}. Set it back, or {advice}"


def _in_its_phase(run: Run) -> str:
    """`phase` would end the phase before once more, and begin the whole of this one."""
    if run.phase is None:
        return ""
    ended = run.phase - 2
    return f" phase=null phases.{ended}.tokens={run.phases[ended].tokens}"


def other_model(weights: Path, run: Run) -> dict[str, str]:
    """As `other_keys`, for a checkpoint of weights alone: the keys of the shape. Of a few its tensors do not tell.

    Raises:
        UserError: what it says of its model cannot be read.
    """
    file = weights / MODEL_FILE
    if not file.is_file():
        return {}
    before, now = load_sections(file, Model).model_dump(), run.model.model_dump()
    return {key: text for key, text in _differences("model", before, now) if _way(key) is _Way.NEW}


def _way(key: str) -> _Way:
    while key not in _WAYS:
        key, dot, _ = key.rpartition(".")
        if not dot:
            raise KeyError(f"saved_run._WAYS has no {key}")
    return _WAYS[key]


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
    # Data has its own fingerprint.
    if key.endswith(".data") or _way(key) is _Way.NOTHING:
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
