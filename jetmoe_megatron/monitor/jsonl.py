"""metrics.jsonl: never two lines for a step, also after kills and resumes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from data_tools.atomic import replacing
from jetmoe_megatron.monitor.monitor import Record

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JsonLines:
    """Lines that the disk refuses wait, and are written when it has room again."""

    def __init__(self, path: Path, resume_after_step: int) -> None:
        """Drops lines of steps after `resume_after_step`, which will be run again, and a line cut off by a kill.

        Raises:
            OSError: not for want of room.
        """
        self.path, self.waiting = path, b""
        self.file: FileIO | None = None
        self._amended: tuple[int, Record] | None = None  # values that a step's line is still to be given
        self._warned = False
        self._end = _end_of(path, resume_after_step)
        self._try()

    def write(self, record: Record) -> None:
        self.waiting += _line(record)
        self._try()

    def amend(self, step: int, values: Record) -> None:
        """Add values to the line that a step has already."""
        self._amended = (step, values)
        self._try()

    def close(self) -> None:
        """Raises OSError if lines are lost."""
        try:
            self._flush()
        except OSError as error:
            lost = self.waiting.count(b"\n") + bool(self._amended)
            raise OSError(error.errno, f"{self.path}: {error.strerror}: {lost} lines are lost") from None
        finally:
            if self.file:
                self.file.close()

    def _try(self) -> None:
        try:
            self._flush()
            self._warned = False
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            if not self._warned:
                print(f"warning: {self.path}: {error.strerror}: its lines wait", file=sys.stderr, flush=True)
            self._warned = True

    def _flush(self) -> None:
        if self.file is None:
            file = open(self.path, "ab", buffering=0)
            file.truncate(self._end)
            self.file = file
        if self._amended:
            step, values = self._amended
            write_records(self.path, (r | values if r["step"] == step else r for r in each_record(self.path)))
            self.file.close()
            self.file, self._amended = open(self.path, "ab", buffering=0), None
        whole = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self.waiting) < len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.waiting = b""
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(whole)  # of half a line
            raise


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One line each, all of them or, after a kill or an OSError, what the file held before.

    They may be read from it meanwhile.
    """
    with replacing(path) as file:
        file.writelines(_line(record) for record in records)


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _end_of(path: Path, step: int) -> int:
    """Where the lines of steps up to `step` end, in bytes."""
    end = 0
    for position, record in _each_line(path):
        if record and record["step"] > step:
            break
        end = position if record else end
    return end


def each_record(path: Path) -> Iterator[dict[str, Any]]:
    """The valid records of the file, if there is one; cut-off and broken lines are left out. One is held at a time."""
    return (record for _, record in _each_line(path) if record)


def _each_line(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(where it ends, its record or None if it is broken)"""
    if not path.is_file():
        return
    position = 0
    with open(path, "rb") as lines:
        for line in lines:
            position += len(line)
            try:
                record = json.loads(line.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError):
                record = None
            valid = isinstance(record, dict) and isinstance(record.get("step"), int) and line.endswith(b"\n")
            valid = valid and _is_shallow(record)
            yield position, record if valid else None


def _is_shallow(value: Any, levels: int = 4) -> bool:
    """As all that is written here. What is nested too deeply could be read, and not written again."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(levels > 1 and _is_shallow(entry, levels - 1) for entry in inner)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All of `each_record`."""
    return list(each_record(path))
