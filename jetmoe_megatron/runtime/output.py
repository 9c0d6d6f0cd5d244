"""Output that cannot be written does not end a run: the terminal is closed, the reader of a pipe has ended (Ctrl-C ends
a `tee` too), or the disk is full."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class _Lasting:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlast_readers() -> None:
    """From now on a print that fails is lost, and so is one to a stream that was closed before Python began."""
    sys.stdout, sys.stderr = (_Lasting(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))
