"""What lies in a checkpoint beside the tensors: the resolved run and its progress. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from jetmoe_megatron.config import Run, load_run
from jetmoe_megatron.errors import UserError

RUN_FILE = "run.yaml"  # the resolved run
PROGRESS_FILE = "progress.json"  # consumed tokens, and what else a resumed run must know
# What the losses of the steps to come depend on: a resumed run must agree in it.
_MUST_AGREE = ("seed", "model", "losses", "precision", "batch", "optimizer", "schedule", "phases")


def refuse_other_run(path: Path, run: Run) -> None:
    """Raises UserError that names the first key in which `run` differs from the run saved in `path`."""
    saved, now = yaml.safe_load((path / RUN_FILE).read_text(encoding="utf-8")), run.model_dump()
    for section in _MUST_AGREE:
        difference = _difference(section, saved.get(section), now[section])
        if difference:
            raise UserError(
                f"{path}: cannot resume with another {difference}: set it back or choose another output_dir"
            )


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """`tokens`, the consumed ones, and `data`, the ledger. Raises UserError if the file is missing or damaged."""
    file = checkpoint / PROGRESS_FILE
    try:
        progress = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(progress["tokens"], int) and isinstance(progress["data"], dict)
        return progress
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{file}: missing or damaged, so that the checkpoint cannot be resumed from") from None


def _difference(key: str, saved: Any, now: Any) -> str | None:
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in {**saved, **now}:
            # How the work is split and computed may change; what is computed may not. Data has its own fingerprint.
            if (key, name) in {("model", "expert_backend"), ("batch", "micro_sequences")} or name == "data":
                continue
            if found := _difference(f"{key}.{name}", saved.get(name), now.get(name)):
                return found
        return None
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for i, (a, b) in enumerate(zip(saved, now, strict=True)):
            if found := _difference(f"{key}.{i}", a, b):
                return found
        return None
    return None if saved == now else f"{key} (saved {saved!r}, now {now!r})"


def read_saved_run(checkpoint: Path) -> Run:
    """Raises UserError if the folder is not a published checkpoint."""
    file = checkpoint / RUN_FILE
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint folder")
    if not file.is_file():
        raise UserError(f"{checkpoint}: not a checkpoint of this program: it has no {RUN_FILE}")
    return load_run(file)
