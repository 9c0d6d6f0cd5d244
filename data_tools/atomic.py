"""Files that appear under their names only when they are whole."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def temporary_path(path: Path) -> Path:
    """An unused name beside `path`, on the same filesystem, so that `os.replace` to `path` is one step."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def sync(stream: IO[bytes]) -> None:
    """Write a file to the disk. Without this, a power cut after the rename can leave an empty file."""
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that replaces it at the end of the block, once its content is on the disk.

    After a kill or an error, `path` is unchanged. Only one process at a time may use this.
    """
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)  # left by a kill; if it is a link, only the link goes
    try:
        with open(aside, "xb") as stream:
            yield stream
            sync(stream)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
