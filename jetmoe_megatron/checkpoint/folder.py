"""The folders `checkpoints/tokens_<N>` of a run: which there are, publishing, retention. No tensors here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_NAME = re.compile(r"tokens_(\d+)")
UNFINISHED = ".partial"  # a folder that is being written has this at its end


def checkpoint_path(root: Path, tokens: int) -> Path:
    return root / f"tokens_{tokens}"


def published(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest(root: Path) -> Path | None:
    found = published(root)
    return found[-1] if found else None


def clear_unfinished(root: Path) -> None:
    """Remove what an interrupted save has left."""
    for path in root.glob(f"tokens_*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def keep_last(root: Path, count: int) -> None:
    for path in published(root)[:-count]:
        shutil.rmtree(path, ignore_errors=True)
