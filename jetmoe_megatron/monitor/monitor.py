"""Passes each step's record to the writers. A writer that fails is dropped; it never stops a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

Record = dict[str, float | int | str]


class Writer(Protocol):
    def write(self, record: Record) -> None:
        """Take the record of one step; `step` counts from 1."""

    def amend(self, step: int, values: Record) -> None:
        """Take more values of the last step that the previous process wrote."""

    def close(self) -> None: ...


class Monitor:
    """A no-op on ranks that have no writers."""

    def __init__(self, builders: list[Callable[[], Writer]]) -> None:
        """A writer that cannot be built, for example without a network, is left out with a warning."""
        self.writers: list[Writer] = []
        for build in builders:
            try:
                self.writers.append(build())
            except Exception as error:
                _warn(getattr(build, "func", build), error)

    def log(self, record: Record) -> None:
        self._each(lambda writer: writer.write(record))

    def amend(self, step: int, values: Record) -> None:
        self._each(lambda writer: writer.amend(step, values))

    def close(self) -> None:
        self._each(lambda writer: writer.close())

    def _each(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self.writers):
            try:
                call(writer)
            except Exception as error:
                self.writers.remove(writer)
                _warn(type(writer), error)


def _warn(writer: Any, error: Exception) -> None:
    reason = str(error).split("\n")[0]
    print(f"warning: {writer.__name__} failed and is switched off for this run: {reason}", file=sys.stderr, flush=True)
