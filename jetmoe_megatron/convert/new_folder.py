"""A folder that appears under its name only when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jetmoe_megatron.errors import UserError


@contextmanager
def new_folder(path: Path, nbytes: int) -> Iterator[Path]:
    """A folder to write to, renamed to `path` when the block ends well and removed when it does not.

    Raises:
        UserError: `path` exists, the disk has less than `nbytes` free, or writing fails.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; remove it or choose another folder")
    aside = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < nbytes:
            raise UserError(f"{path}: needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        aside.mkdir()
        yield aside
        aside.rename(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
