"""Back to the newest checkpoint, and on with other data: what came between, up to the bad step, is not read again.

A rollback is a resume that finds a note. The note replaces the position in the data that the checkpoint holds, for as
long as that checkpoint is the newest, so that a run that is killed before its next one resumes the same way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import RootModel, ValidationError, model_validator

from data_tools.atomic import replacing
from jetmoe_megatron.checkpoint.saved_run import Note, in_short
from jetmoe_megatron.data.ledger import Ledger
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.training.guard import Guard

if TYPE_CHECKING:
    from jetmoe_megatron.training.start import Start

NOTES = "rollbacks.json"  # among the checkpoints: {tokens of a checkpoint: what replaces its progress}


class _Notes(RootModel[dict[str, Note]]):
    @model_validator(mode="after")
    def _at_their_places(self) -> _Notes:
        for tokens, note in self.root.items():
            if str(note.data.tokens) != tokens:
                raise ValueError(f"the note for {tokens} tokens is one for {note.data.tokens}")
        return self


def roll_back(checkpoints: Path, start: Start, ledger: Ledger, guard: Guard) -> None:
    """Leave the note. All ranks call it, when no save is under way.

    Args:
        start: where a resume would begin now.
        ledger: of all that was read, the bad step included.
    """
    if torch.distributed.get_rank() == 0:
        tokens = start.progress["tokens"]
        saved = Guard.load(guard.options, start.progress.get("guard"))
        saved.bad = guard.bad  # it counts on: a run that cannot get past a place must end
        note = {"data": ledger.back_to(start.ledger.read).dump(), "guard": saved.dump()}
        _write(checkpoints / NOTES, {**_read(checkpoints / NOTES), str(tokens): note})
        print(
            f"warning: rolled back to {tokens:,} tokens; the data read since is left out", file=sys.stderr, flush=True
        )
    torch.distributed.barrier()


def read_rollback(checkpoints: Path, tokens: int) -> dict[str, Any]:
    """What replaces the progress of the checkpoint at so many tokens; nothing if none was rolled back to it."""
    return _read(checkpoints / NOTES).get(str(tokens), {})


def _read(file: Path) -> dict[str, Any]:
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise UserError(f"{file}: is no file: move it away")
    try:
        return _Notes.model_validate_json(file.read_bytes()).model_dump(exclude_unset=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{file}: damaged ({in_short(error)}): restore it, or delete it to read again what was rolled back over"
        ) from None


def _write(file: Path, notes: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(json.dumps(notes, indent=1).encode())
    except OSError as error:
        raise UserError(f"{file}: cannot be written, so that the run cannot roll back: {error.strerror}") from error
