"""Files that appear under their names only when they are whole."""

import os
import secrets
from pathlib import Path
from typing import IO


def temporary_path(path: Path) -> Path:
    """A free name beside `path`: on the same filesystem, so that `os.replace` to `path` is one step."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def sync(stream: IO[bytes]) -> None:
    """Reach the disk before the rename does, else a power cut can leave an empty file under its name."""
    stream.flush()
    os.fsync(stream.fileno())
