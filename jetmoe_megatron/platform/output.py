"""Output that nobody can take any more does not end a run: its terminal is closed, its pipe has lost its reader (Ctrl-C
ends a `tee` too), its disk is full."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)  # for good; a full disk may have room again


class _Lasting:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        if error.errno in _GONE:  # what waits in the buffer must not fail once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def outlast_readers() -> None:
    """From now on a print that fails is lost."""
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)  # type: ignore[assignment]
