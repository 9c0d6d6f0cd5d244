"""Back to the newest checkpoint, to continue with other data: what was read since, up to the bad step, is left out.

A rollback is a resume that finds a note. As long as that checkpoint is the newest, the note replaces its position in
the data. So a run that is killed before its next checkpoint resumes in the same way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import RootModel, ValidationError, model_validator

from data_tools.atomic import replacing
from jetmoe_megatron.checkpoint.progress import Note, first_problem
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.data.ledger import Ledger
from jetmoe_megatron.errors import UserError


class _Notes(RootModel[dict[str, Note]]):
    """`rollbacks.json`: the number of tokens of a checkpoint, and what replaces its progress."""

    @model_validator(mode="after")
    def _at_their_places(self) -> _Notes:
        for tokens, note in self.root.items():
            if str(note.data.tokens) != tokens:
                raise ValueError(f"the note for {tokens} tokens is one for {note.data.tokens}")
        return self


def roll_back(folder: RunFolder, tokens: int, ledger: Ledger, guard: dict[str, Any]) -> None:
    """Write the note. All ranks call it, while no save is running.

    Args:
        tokens: of the checkpoint at which a resume would begin now.
        ledger, guard: what replaces those of that checkpoint.
    """
    if torch.distributed.get_rank() == 0:
        note = {"data": ledger.dump(), "guard": guard}
        _write(folder.rollbacks, {**_read(folder.rollbacks), str(tokens): note})
        print(
            f"warning: rolled back to {tokens:,} tokens; the data read since is left out", file=sys.stderr, flush=True
        )
    torch.distributed.barrier()


def read_rollback(folder: RunFolder, tokens: int) -> dict[str, Any]:
    """What replaces the progress of the checkpoint at `tokens` tokens; empty if no rollback led there."""
    return _read(folder.rollbacks).get(str(tokens), {})


def _read(file: Path) -> dict[str, Any]:
    if file.exists() and not file.is_file():  # opening a pipe would block
        raise UserError(f"{file}: is no file: move it away")
    try:
        return _Notes.model_validate_json(file.read_bytes()).model_dump(exclude_unset=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        problem = first_problem(error)
        raise UserError(
            f"{file}: damaged ({problem}): restore it, or delete it to read the data again that was left out"
        ) from None


def _write(file: Path, notes: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(json.dumps(notes, indent=1).encode())
    except OSError as error:
        raise UserError(f"{file}: cannot be written, so that the run cannot roll back: {error.strerror}") from error
