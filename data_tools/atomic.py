"""Files that appear under their names only when they are whole."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def temporary_path(path: Path) -> Path:
    """A free name beside `path`: on the same filesystem, so that `os.replace` to `path` is one step."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def sync(stream: IO[bytes]) -> None:
    """Reach the disk before the rename does, else a power cut can leave an empty file under its name."""
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, which takes its place at the end of the block, when all of it has reached the disk.

    After a kill or an error `path` holds what it held before. One process at a time may do it.
    """
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)  # of a kill; where it is a link, that
    try:
        with open(aside, "xb") as stream:
            yield stream
            sync(stream)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
