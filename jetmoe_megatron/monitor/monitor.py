"""Passes each step's record to the writers. A writer that fails is dropped; it never stops a run."""

from __future__ import annotations

import sys
from typing import Protocol

Record = dict[str, float | int | str]


class Writer(Protocol):
    def write(self, record: Record) -> None:
        """Take the record of one step; `step` counts from 1."""

    def close(self) -> None: ...


class Monitor:
    """A no-op on ranks that have no writers."""

    def __init__(self, writers: list[Writer]) -> None:
        self.writers = writers

    def log(self, record: Record) -> None:
        for writer in list(self.writers):
            try:
                writer.write(record)
            except Exception as error:
                self._drop(writer, error)

    def close(self) -> None:
        for writer in list(self.writers):
            try:
                writer.close()
            except Exception as error:
                self._drop(writer, error)

    def _drop(self, writer: Writer, error: Exception) -> None:
        self.writers.remove(writer)
        name = type(writer).__name__
        print(f"warning: {name} failed and is switched off for this run: {error}", file=sys.stderr, flush=True)
